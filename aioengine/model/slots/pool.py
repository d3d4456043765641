"""The adapter slots on the device: one memory, in which each slot's adapter takes what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from aioengine.errors import ConfigError
from aioengine.kernels import LoRABatch
from aioengine.kernels.slots import ALIGNMENT, LoRAPool, SlotMemory
from aioengine.model.buffer import Buffer
from aioengine.model.parallel.group import SOLO, Shard
from aioengine.model.pooling import Head, Kind
from aioengine.model.slots.copy import StreamCopier
from aioengine.model.slots.image import AdapterImage
from aioengine.model.slots.layout import FLOATS, Elements, FusedPlace, SlotLayout
from aioengine.model.slots.tokens import SlotTokens, ids_of
from aioengine.model.spec import NO_LAYER, ModelSpec


class LoRASlots:
    """``max_loras`` slots for adapters of up to ``max_rank``, for ``target_modules`` (of
    ``TARGETABLE_MODULES``).

    ``layers[i]`` maps the fused linear's name ("qkv", "o", "gate_up", "down") to its pool, and ``outer``
    does the same for "embed_tokens" and "lm_head". All slots share one memory, in which each adapter takes
    what it needs, wherever it begins. It has ``nbytes``; None: room for ``max_rank`` in every module of each
    slot, and for ``max_tokens`` trained tokens.

    ``dtype`` may be int8: the matrices are, and gains and shifts are of ``affine_dtype`` (else that is
    ``dtype``). With ``turned``, B is turned when it is written, for the compiled library.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_loras: int,
        max_rank: int,
        target_modules: Iterable[str],
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = SOLO,
        *,
        nbytes: int | None = None,
        affine_dtype: torch.dtype | None = None,
        max_tokens: int = 0,
        turned: bool = False,
    ) -> None:
        holds = FLOATS
        if dtype == torch.int8:
            assert affine_dtype is not None, "int8 slots need the model's dtype for gains and shifts"
            holds = Elements(True, affine_dtype.itemsize)
        self.layout = layout = SlotLayout(spec, max_rank, target_modules, shard, holds, max_tokens)
        self.max_loras = max_loras
        elements = max_loras * layout.elements if nbytes is None else nbytes // dtype.itemsize
        if device.type == "cpu":
            memory = Buffer(elements * dtype.itemsize).tensor.view(dtype)
        else:
            memory = torch.empty(elements, dtype=dtype, device=device)
        aligned = holds.int8 or (device.type != "cpu" and _aligned(layout))
        places = len(layout.places)
        self.memory = SlotMemory(
            memory, max_loras, places, max_rank, aligned=aligned, dtype=affine_dtype, turned=turned
        )
        self._outputs = [place.shape.out_features for place in layout.places.values()]
        """Of the matrices B, by place."""
        self.copier = StreamCopier(device) if device.type == "cuda" else None
        """What orders writes and steps; None: slots in CPU memory, of which each is written in the calling
        thread."""
        self.has_affine = [False] * max_loras
        """Whether each slot's adapter scales or shifts outputs (DoRA, ``lora_bias``)."""
        self.heads: list[Head | None] = [None] * max_loras
        """The trained head of each slot's adapter, if it has one, on the device."""
        self.poolings: list[Kind | None] = [None] * max_loras
        """Pooling of each slot's adapter; None if it chooses none."""
        self.tokens: list[SlotTokens | None] = [None] * max_loras
        """The trained tokens of each slot's adapter, if it has some."""

        self.outer: dict[str, LoRAPool] = {}
        self.layers: list[dict[str, LoRAPool]] = [{} for _ in range(spec.num_layers)]
        for fused in layout.fused:
            pools = self.outer if fused.layer == NO_LAYER else self.layers[fused.layer]
            pools[fused.name] = self._pool(fused)

    def _pool(self, fused: FusedPlace) -> LoRAPool:
        """Return the pool of a linear; of those of experts below each other, as if there were only the
        first."""
        experts = self.layout.spec.experts_in(fused.name)
        modules = fused.modules[: len(fused.modules) // experts] if experts else fused.modules
        places = [self.layout.places[fused.layer, module] for module in modules]
        return LoRAPool(
            self.memory.by_place() if experts else self.memory,
            modules,
            self.layout.index[fused.layer, modules[0]],
            places[0].shape.in_features,
            tuple(place.shape.out_features for place in places),
            fused.b_columns[: len(modules)],
            tuple(place.num_outputs for place in places),
            fused.columns[: len(modules)],
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.memory.dtype

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all slots."""
        return self.memory.memory.nbytes

    def replaces_logits(self, batch: LoRABatch) -> bool:
        """Whether an adapter in the batch has trained tokens in the head."""
        return any(tokens.has_logits for _, tokens in self.trained(batch))

    def trained(self, batch: LoRABatch) -> Iterator[tuple[slice, SlotTokens]]:
        """Yield the batch's tokens whose adapters have trained tokens."""
        for segment in batch.segments:
            if (tokens := self.tokens[segment.slot]) is not None:
                yield slice(segment.start, segment.stop), tokens

    def write(self, slot: int, image: AdapterImage, offset: int | None = None) -> None:
        """Put an adapter into a slot; ``offset`` is where it begins in the memory, in bytes; None: where the
        slot would begin if all had the same size.

        Called in one thread, while steps may read *other* slots. Raises :class:`ConfigError`, before a
        byte is written, if the slot does not exist, the image was made for other slots, or it does not fit
        there. If it fails later, the slot holds nothing that may be read until a write into it succeeds.
        """
        if not 0 <= slot < self.max_loras:
            raise ConfigError(f"slot {slot}: there are max_loras={self.max_loras} slots")
        if image.shape.layout is not self.layout:
            raise ConfigError(
                "the adapter was prepared for slots of another model, max_lora_rank or target_modules, or of "
                "another lora_dtype"
            )
        memory = self.memory
        begin = slot * self.layout.elements if offset is None else offset // self.dtype.itemsize
        end = begin + len(image.data)
        if begin < 0 or end > len(memory.memory):
            raise ConfigError(
                f"slot {slot}: an adapter of {image.nbytes} bytes cannot begin at offset {offset} of a "
                f"memory of {self.nbytes} bytes"
            )
        rows, counted = memory.rows(torch.tensor(image.shape.rows, dtype=torch.int64), begin)
        copies = [(memory.memory[begin:end], image.data), (memory.device_table[slot], counted)]
        head, trained = image.head, image.shape.tokens
        # Only where embeddings can be trained the layout knows them.
        columns = slice(0) if trained is None else self.layout.partition.vocabulary
        ids = [] if trained is None else ids_of(trained, columns)
        parts = [] if head is None else [part for part in head if part is not None]
        if self.copier is None:
            torch._foreach_copy_([to for to, _ in copies], [source for _, source in copies])
            there = [*ids, *parts]
        else:
            there = self.copier.write(copies, [*ids, *parts])
        ids, there = there[: len(ids)], there[len(ids) :]
        if memory.turned:
            memory.turn(rows, self._outputs)
        memory.table[slot] = rows
        self.has_affine[slot] = image.has_affine
        self.heads[slot] = None if head is None else Head(there[0], there[1] if len(there) > 1 else None)
        self.poolings[slot] = image.pooling
        self.tokens[slot] = None
        if trained is not None:
            size, rows_begin = self.layout.spec.hidden_size, begin + image.shape.tokens_begin
            self.tokens[slot] = SlotTokens(trained, ids, memory, size, columns, rows_begin)


def _aligned(layout: SlotLayout) -> bool:
    """Whether everything begins at a multiple of ``ALIGNMENT`` elements, whatever the ranks are."""
    places = layout.places.values()
    return not any(n % ALIGNMENT for place in places for n in (*place.shape, place.num_outputs))
