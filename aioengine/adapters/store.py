"""Memory of the CPU adapter cache, by uid. The core decides which adapters enter and leave. Imports torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import Lock

import torch

from aioengine.adapters.peft.dora import BaseWeights, Rows, output_affine, rows_of
from aioengine.adapters.peft.folding.mix import add_up
from aioengine.adapters.peft.pack import PackedAdapter
from aioengine.adapters.peft.read import AdapterReader
from aioengine.adapters.peft.values import Place
from aioengine.adapters.read_threads import Progress
from aioengine.model.buffer import Allocate, pageable
from aioengine.model.linear import WeightRows
from aioengine.model.slots.image import (
    AdapterImage,
    build_image,
    calling_thread_alone,
    image_shape,
    is_finite,
)
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import NO_LAYER
from aioengine.step import AdapterSource, LoadedAdapter, MixFiles, MixPart


class Draft:
    """An adapter that has been read, before the tensor-parallel ranks have exchanged their parts of DoRA's
    norms.

    Where the inputs of a linear are split, a rank has a part of each row of the weight. It offers the sums of
    squares of its parts, and receives the sums over all ranks. Whatever the ranks, all draft the same rows of
    one adapter, in the same order.
    """

    def __init__(
        self, packed: PackedAdapter, layout: SlotLayout, weights: BaseWeights, dtype: torch.dtype
    ) -> None:
        """``layout`` and ``dtype`` are the slots'."""
        self.packed = packed
        split, partition = layout.shard.size > 1, layout.partition
        self._rows = rows_of(packed, weights, sorted(packed.magnitudes)) if packed.magnitudes else {}
        self._parts = {
            key: rows for key, rows in self._rows.items() if split and partition.splits_inputs(key[1])
        }
        self._sizes = [len(part.squares) for part in self._parts.values()]
        self._total = torch.zeros(sum(self._sizes))
        affine = packed.magnitudes.keys() | packed.biases.keys()
        ranks = {key: (len(a), b.shape[1]) for key, (a, b) in packed.tensors.items()}
        tokens = None if packed.tokens is None else packed.tokens.tables
        self.slot_nbytes = image_shape(layout, ranks, affine, dtype, tokens).nbytes
        """Bytes that the adapter takes in a slot."""

    @property
    def loaded(self) -> LoadedAdapter:
        """What the core learns of the adapter. Waits for its digest."""
        packed, head = self.packed, self.packed.head
        return LoadedAdapter(
            packed.rank,
            self.slot_nbytes + (0 if head is None else head.nbytes),
            self.slot_nbytes,
            packed.digest,
            labels=0 if head is None else len(head.weight),
            invocation=packed.invocation,
            scalable=packed.scalable,
        )

    @property
    def squares(self) -> bytes:
        """This rank's sums, which every rank adds, this one included; empty if there is nothing to add."""
        sums = [part.squares for part in self._parts.values()]
        return torch.cat(sums).numpy().tobytes() if sums else b""

    def add(self, squares: bytes) -> None:
        """Add a rank's ``squares``. All ranks add in the same order, so their sums are equal bit for bit."""
        self._total += torch.frombuffer(bytearray(squares), dtype=torch.float32)

    def rows(self) -> dict[Place, Rows]:
        """Return the complete rows, once every rank's part has been added."""
        totals = self._total.split_with_sizes(self._sizes)
        items = zip(self._parts.items(), totals, strict=True)
        return self._rows | {key: part._replace(squares=total) for (key, part), total in items}


class AdapterStore:
    """The adapters in the CPU cache, as slots of this ``layout`` and ``dtype`` hold them: of several ranks,
    the rank's share of each. ``weights`` gives the base model's linears, which DoRA needs. If ``dtype`` is
    int8, ``affine_dtype`` is the dtype of gains and shifts; adapters are read and checked in it, and
    quantized once. ``allocate`` gives the memory of adapters; on ``stream`` a GPU does what reading an
    adapter takes of the base model's weights, so that it does not wait for steps.
    """

    def __init__(
        self,
        layout: SlotLayout,
        *,
        dtype: torch.dtype,
        weights: BaseWeights,
        allocate: Allocate = pageable,
        stream: torch.cuda.Stream | None = None,
        affine_dtype: torch.dtype | None = None,
    ) -> None:
        self._allocate = allocate
        self._layout = floats = layout
        self._slot_dtype = self._dtype = dtype
        if layout.holds.int8 and affine_dtype is not None:  # what it has before adapters are quantized
            floats = SlotLayout(
                layout.spec, layout.max_rank, layout.modules, layout.shard, max_tokens=layout.max_tokens
            )
            self._dtype = affine_dtype
        self._stream = stream
        self._weights = weights
        self._reader = AdapterReader(floats, self._dtype, self._embedding)
        # What it takes of a GPU's memory is planned once, and all computes on the same stream.
        self._one_at_a_time: AbstractContextManager[object] = nullcontext() if stream is None else Lock()
        self.images: dict[int, AdapterImage] = {}
        """What is in the cache. A copy under way keeps alive what it reads."""

    def begin(
        self, name: str, path: str, progress: Progress | None = None, files: AdapterSource | None = None
    ) -> Draft:
        """Read and validate an adapter, or a rank's share of it, to which the other ranks may have to add
        before it is finished. Blocks, so it is called in a loader thread.

        Raises the adapter errors of :class:`aioengine.adapters.peft.read.AdapterReader`.
        """
        # Beside the steps, operations on the base model's weights included, quantized ones expanded.
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with calling_thread_alone(), stream:
            if isinstance(files, MixFiles):
                parts = [(part, self._part(part, progress)) for part in files.parts]
                packed = add_up(self._reader.slot, parts)
            else:
                packed = self._reader.read(name, path, progress, files)
            if packed.magnitudes:  # what is computed of A and B says less of them
                packed.check_finite(self._dtype, self._layout.spec)
            with self._one_at_a_time:
                return Draft(packed, self._layout, self._weights, self._slot_dtype)

    def _part(self, part: MixPart, progress: Progress | None) -> PackedAdapter:
        """Return a part of a mix: as it is in the CPU cache, if it is there and is A and B alone, or else
        from its files, as always with several ranks, so that all have the same content."""
        image = self.images.get(part.uid)
        tensors = None if image is None or self._layout.shard.size > 1 else image.matrices()
        if image is None or tensors is None or part.digest not in ("", image.digest):
            read = self._reader.read(part.name, part.path, progress, part.files)
            return read.scaled(self._dtype)
        digest = image.digest
        return PackedAdapter(rank=image.rank, find_digest=lambda: digest, tensors=tensors)

    def finish(self, draft: Draft) -> AdapterImage:
        """Finish an adapter after all ranks have added their parts. Blocks. Raises AdapterInvalid."""
        with calling_thread_alone():
            return self._image(draft)

    def _image(self, draft: Draft) -> AdapterImage:
        packed, int8 = draft.packed, self._layout.holds.int8
        affine = {} if packed.scalable else output_affine(packed, draft.rows(), self._dtype)
        for (_, module), (_, shift) in affine.items():
            if self._layout.shard.rank > 0 and self._layout.partition.adds_up_adapted(module):
                shift.zero_()  # or the sum over the ranks would have it several times
        image = build_image(
            self._layout,
            packed,
            affine,
            self._dtype,
            self._allocate,
            scalings=packed.scalings,
            tokens=packed.tokens,
        )
        if int8 or not is_finite(image.data):  # whole numbers do not show it
            packed.check_finite(self._dtype, self._layout.spec)
        return replace(image, head=packed.head, pooling=packed.pooling, invocation=packed.invocation)

    def _embedding(self, module: str) -> torch.Tensor:
        """Return the embedding [vocabulary, hidden], or the rank's rows of it."""
        weight = self._weights(NO_LAYER, module)[0].whole()
        return weight.T if module == "embed_tokens" else weight

    def clear(self) -> None:
        """Free everything, the base model's weights included; nothing can be read any more."""
        self.images.clear()
        self._weights = _no_weights


def _no_weights(layer: int, module: str) -> tuple[WeightRows, torch.Tensor | None]:
    raise RuntimeError(f"the base model's {module} of layer {layer} is gone: the engine has stopped")
