"""Converts a file's tensors to those of a slot: scaled, in the slots' dtype, in one buffer in a slot's order.

Everything works on pieces so small that torch stays in the calling thread. Otherwise each loader thread would
have an OpenMP team, which competes with the model's step for the cores; on a busy machine, loads would take
several times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.adapters.peft.folder import AdapterFolder
from aioengine.adapters.peft.folding.embeddings import TOKEN_KINDS
from aioengine.adapters.peft.shard_reads import Cut
from aioengine.adapters.peft.targets import HEAD_KINDS, Layout, Part, Place
from aioengine.adapters.peft.weights_file import Weights
from aioengine.model.buffer import Allocate, pageable
from aioengine.model.parallel.ranges import take
from aioengine.model.pooling import Head
from aioengine.model.slots.image import ImageShape, image_memory, serial_copies
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.tokens import TrainedTokens
from aioengine.model.spec import NO_LAYER

_SERIAL_ELEMENTS = 32768 - 64  # torch goes parallel from 32768 elements


class SlotOrder(NamedTuple):
    """Pack in the order of this slot."""

    layout: SlotLayout
    allocate: Allocate = pageable


class Packed(NamedTuple):
    """Packed tensors; the fields are those of :class:`aioengine.adapters.peft.read.PackedAdapter`."""

    tensors: Mapping[Place, tuple[Tensor, Tensor]]
    magnitudes: dict[Place, Tensor]
    biases: dict[Place, Tensor]
    nbytes: int
    rank: int
    in_order: Tensor
    shape: ImageShape | None = None
    computed: Mapping[Place, tuple[Tensor, Tensor]] = {}
    head: Head | None = None
    tokens: TrainedTokens | None = None


def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """Return the largest absolute value; infinity or NaN if there is one."""
    largest = 0.0
    for tensor in tensors:
        for piece in _pieces(tensor):
            # aminmax propagates NaN and costs a fraction of isfinite().all().
            low, high = (x.item() for x in piece.aminmax())
            largest = max(largest, -low, high) if low == low else math.nan
            if not math.isfinite(largest):
                return largest
    return largest


class Packer:
    """Checks and packs the tensors of one file, or the parts of them that a rank has read; ``cuts`` says
    which those are."""

    def __init__(
        self,
        folder: AdapterFolder,
        file: str,
        layout: Layout,
        parts: Mapping[str, Part],
        weights: Weights,
        *,
        dtype: torch.dtype,
        allow_nonfinite: bool,
        order: SlotOrder,
        cuts: Mapping[str, Cut],
    ) -> None:
        self._folder = folder
        self._file = file
        self._layout = layout
        self._weights = weights
        self._dtype = dtype
        self._allow_nonfinite = allow_nonfinite
        self._cuts = cuts
        self._keys = {part: key for key, part in parts.items()}
        self._largest = math.nan
        self._kept = [part for part in self._keys if part.kind in ("A", "B", "bias")]
        self._sources = [self._held(self._keys[part]) for part in self._kept]
        targets = layout.targets
        self._factors = [1.0 if part.kind == "A" else targets[part.place].scaling for part in self._kept]
        self._same_dtype = all(source.dtype == dtype for source in self._sources)
        self._results, in_order = self._allocate(order)
        self._groups = _by_factor(self._results, self._factors) if self._same_dtype else {}
        self._packed = self._assemble(in_order)

    def check(self, base_weight: Callable[[str], Tensor]) -> None:
        """Check the values as they are in the file. Raises AdapterInvalid."""
        if not self._allow_nonfinite:
            self._largest = largest_magnitude(self._weights.runs)
            if not math.isfinite(self._largest):
                tensors = self._weights.tensors.items()
                key = next(key for key, tensor in tensors if not math.isfinite(largest_magnitude([tensor])))
                self._folder.invalid(f"{self._file}: {key}: the weights contain NaN or infinity")
        for part, key in self._keys.items():
            if part.kind == "base":
                self._check_base(key, part.place[1], base_weight)
        if self._layout.tied:
            self._check_tied()
        self._find_tokens(base_weight)

    def pack(self) -> Packed:
        """Scale and convert. Raises AdapterInvalid on overflow of the dtype."""
        if self._same_dtype:
            torch._foreach_copy_(_all_pieces(self._results), _all_pieces(self._sources))
            _scale(self._groups)
        else:
            for source, factor, result in zip(self._sources, self._factors, self._results, strict=True):
                _convert(source, factor, result)
        self._check_overflow()
        return self._packed._replace(computed=self._computed())

    # -- what is checked ---------------------------------------------------------------------

    def _check_base(self, key: str, module: str, base_weight: Callable[[str], Tensor]) -> None:
        """Check the base weights that PEFT saves with an adapted embedding: they must equal the served
        model's."""
        without = "save the adapter with save_pretrained(..., save_embedding_layers=False)"
        where = f"{self._file}: {key!r}: the file carries base-model weights"
        saved, base = self._weights.tensors[key], base_weight(module)
        same = base.shape == saved.shape and all(
            torch.equal(ours.to("cpu", saved.dtype), theirs)
            for ours, theirs in zip(_pieces(base), _pieces(saved), strict=True)
        )
        if not same:
            self._folder.invalid(
                f"{where} that differ from the base model's: if {module} was trained or resized this adapter "
                f"cannot be served over this base model; if not, {without}"
            )

    def _find_tokens(self, base_weight: Callable[[str], Tensor]) -> None:
        found = {
            (part.place[1], part.kind): self._weights.tensors[key]
            for part, key in self._keys.items()
            if part.kind in TOKEN_KINDS
        }
        tokens = self._layout.embeddings.trained(
            self._file, found, base_weight, self._dtype, finite=not self._allow_nonfinite
        )
        if tokens is not None:
            nbytes = self._packed.nbytes + tokens.rows.nbytes
            self._packed = self._packed._replace(tokens=tokens, nbytes=nbytes)

    def _check_tied(self) -> None:
        """Check that both copies of lm_head's adapter, which ``ensure_weight_tying`` saves, are equal."""
        weights, keys = self._weights.tensors, self._keys
        for ours, theirs in (("A", "B"), ("B", "A")):
            head = weights[keys[Part((NO_LAYER, "lm_head"), ours)]]
            mirrored = weights[keys[Part((NO_LAYER, "embed_tokens"), theirs)]].t()
            axis = int(head.shape[1] > head.shape[0])
            step = max(1, _SERIAL_ELEMENTS // head.shape[1 - axis])
            if not all(map(torch.equal, torch.split(head, step, axis), torch.split(mirrored, step, axis))):
                self._folder.invalid(
                    f"{self._file}: ensure_weight_tying ties the adapter of lm_head to that of embed_tokens, "
                    "but their weights differ"
                )

    def _check_overflow(self) -> None:
        bound = self._largest * max(1.0, *map(abs, self._factors))
        if self._allow_nonfinite or bound <= torch.finfo(self._dtype).max:
            return
        for part, result in zip(self._kept, self._results, strict=True):
            if not math.isfinite(largest_magnitude([result])):
                self._folder.invalid(
                    f"{self._file}: {self._layout.targets[part.place].name}: the scaled weights overflow "
                    f"{self._dtype}; set lora_dtype to bfloat16 or float32"
                )

    # -- memory ------------------------------------------------------------------------------

    def _allocate(self, order: SlotOrder) -> tuple[list[Tensor], Tensor]:
        """Allocate the buffers. Biases are not part of a slot as they are, so they get their own."""
        results = {
            index: torch.empty(self._sources[index].shape, dtype=self._dtype)
            for index, part in enumerate(self._kept)
            if part.kind == "bias"
        }
        places = order.layout.places

        def slot_offset(index: int) -> int:
            part = self._kept[index]
            place = places[part.place]
            return place.a if part.kind == "A" else place.b

        matrices = sorted((i for i in range(len(self._kept)) if i not in results), key=slot_offset)
        sizes = [self._sources[index].numel() for index in matrices]
        affine = {part.place for part in self._keys if part.kind in ("bias", "magnitude")}
        room = sum(2 * places[place].num_outputs for place in affine)
        data = image_memory(sum(sizes) + room, self._dtype, order.allocate)
        for index, share in zip(matrices, data.split_with_sizes([*sizes, room]), strict=False):
            results[index] = share.view(self._sources[index].shape)
        return [results[index] for index in range(len(self._kept))], data

    def _assemble(self, in_order: Tensor) -> Packed:
        by_kind: dict[str, dict[Place, Tensor]] = {"A": {}, "B": {}, "bias": {}}
        for part, result in zip(self._kept, self._results, strict=True):
            by_kind[part.kind][part.place] = result
        magnitudes, head = self._magnitudes(), self._head()
        extra = 0 if head is None else head.nbytes
        return Packed(
            tensors={place: (by_kind["A"][place], by_kind["B"][place]) for place in self._layout.targets},
            magnitudes=magnitudes,
            biases=by_kind["bias"],
            nbytes=in_order.nbytes + extra + sum(magnitude.nbytes for magnitude in magnitudes.values()),
            rank=max(target.rank for target in self._layout.targets.values()),
            in_order=in_order,
            head=head,
        )

    def _held(self, key: str) -> Tensor:
        """Return the part of what was read that the slot holds."""
        tensor, cut = self._weights.tensors[key], self._cuts.get(key)
        return tensor if cut is None else contiguous(take(tensor, cut.held))

    def _computed(self) -> dict[Place, tuple[Tensor, Tensor]]:
        """Return DoRA's A and B as they were read, where the slot holds only a part of them, in the slots'
        dtype."""
        if not self._cuts:
            return {}
        found: dict[Place, tuple[Tensor, Tensor]] = {}
        held = dict(zip(self._kept, self._results, strict=True))
        for place in self._packed.magnitudes:
            both = []
            for part in (Part(place, "A"), Part(place, "B")):
                source = self._weights.tensors[self._keys[part]]
                result = held[part]
                if source.shape != result.shape:
                    result = torch.empty(source.shape, dtype=self._dtype)
                    factor = 1.0 if part.kind == "A" else self._layout.targets[place].scaling
                    _convert(source, factor, result)
                both.append(result)
            found[place] = both[0], both[1]
        return found

    def _head(self) -> Head | None:
        found = {part.kind: self._weights.tensors[key] for part, key in self._keys.items()}
        parts: list[Tensor | None] = []
        for kind in HEAD_KINDS:
            part = torch.empty(found[kind].shape, dtype=torch.float32) if kind in found else None
            if part is not None:
                _convert(found[kind], 1.0, part)
            parts.append(part)
        weight, bias = parts
        return None if weight is None else Head(weight, bias)

    def _magnitudes(self) -> dict[Place, Tensor]:
        """Convert to float32 in separate memory: magnitudes are small and stay on the CPU."""
        magnitudes = {}
        for part, key in self._keys.items():
            if part.kind == "magnitude":
                magnitudes[part.place] = torch.empty(self._weights.tensors[key].shape, dtype=torch.float32)
                _convert(self._weights.tensors[key], 1.0, magnitudes[part.place])
        return magnitudes


def contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor itself if it is contiguous, else a copy."""
    if tensor.is_contiguous():
        return tensor
    copied = torch.empty(tensor.shape, dtype=tensor.dtype)
    pairs = list(serial_copies(tensor, copied.view(-1)))
    torch._foreach_copy_([to for to, _ in pairs], [values for _, values in pairs])
    return copied


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Split into flat pieces, each too small for torch to start threads."""
    flat = tensor.reshape(-1)
    return torch.split(flat, _SERIAL_ELEMENTS) if flat.numel() else ()


def _all_pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces.extend((tensor,) if tensor.numel() <= _SERIAL_ELEMENTS else _pieces(tensor))
    return pieces


def _by_factor(tensors: Sequence[Tensor], factors: Sequence[float]) -> dict[float, list[Tensor]]:
    groups: dict[float, list[Tensor]] = {}
    for tensor, factor in zip(tensors, factors, strict=True):
        if factor != 1.0:
            small = tensor.numel() <= _SERIAL_ELEMENTS
            groups.setdefault(factor, []).extend((tensor,) if small else _pieces(tensor))
    return groups


def _scale(groups: Mapping[float, list[Tensor]]) -> None:
    """Compute ``tensor *= factor`` for each, in float32 and rounded once."""
    for factor, group in groups.items():
        # As a tensor, because a number would be rounded to the group's dtype first.
        torch._foreach_mul_(group, torch.tensor(factor, dtype=torch.float32))


def _convert(source: Tensor, factor: float, target: Tensor) -> None:
    """Compute ``target = source * factor`` in float32, rounded once. ``source`` stays: it may be hashed."""
    for piece, result in zip(_pieces(source), _pieces(target), strict=True):
        result.copy_(piece if factor == 1.0 else piece.float() * factor)
