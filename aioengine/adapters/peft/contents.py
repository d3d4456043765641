"""What a weights file holds and where it goes: all of an adapter but its data.

Adapters that were trained alike have the same configuration and the same header, so this is computed once for
all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig
from aioengine.adapters.peft.shard_reads import Cut, cuts_of, select
from aioengine.adapters.peft.targets import Layout, Part, Place
from aioengine.adapters.peft.weights_file import Entry, Weights
from aioengine.model.buffer import Allocate, pageable
from aioengine.model.parallel.ranges import EVERYTHING, count, take
from aioengine.model.slots.image import (
    SERIAL_ELEMENTS,
    ImageShape,
    image_memory,
    image_shape,
    serial_copies,
    serial_pieces,
)
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import NO_LAYER

MAX_WARNINGS = 64
"""Maximum number of warnings about expressions that RE2 does not take."""
Shape = tuple[int, ...]


class SlotOrder(NamedTuple):
    """Pack in the order of this slot."""

    layout: SlotLayout
    allocate: Allocate = pageable


class Matrices(Mapping[Place, tuple[Tensor, Tensor]]):
    """A and B by place: views of an image, created on demand."""

    def __init__(self, image: Tensor, where: Mapping[Place, Mapping[str, tuple[int, Shape]]]) -> None:
        self._image = image
        self._where = where

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor]:
        (a, a_shape), (b, b_shape) = (self._where[place][kind] for kind in "AB")
        return (
            self._image[a : a + a_shape[0] * a_shape[1]].view(a_shape),
            self._image[b : b + b_shape[0] * b_shape[1]].view(b_shape),
        )

    def __iter__(self) -> Iterator[Place]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class ImagePlan:
    """Copies a file's matrices to an image, in the order of a slot: scaled, and converted to ``dtype``.

    Both are cut into the same pieces, so small that torch stays in the calling thread. Otherwise each loader
    thread would have an OpenMP team, which competes with the model's step for the cores; on a busy machine,
    loads would take several times as long.

    Args:
        shapes: Shapes of the tensors that are read, by key.
        one_run: Whether the tensors follow each other in memory, in this order and in ``dtype``.
    """

    def __init__(
        self,
        slot: SlotLayout,
        dtype: torch.dtype,
        layout: Layout,
        parts: Mapping[str, Part],
        cuts: Mapping[str, Cut],
        shapes: Mapping[str, Shape],
        *,
        one_run: bool,
    ) -> None:
        self._dtype = dtype
        self._held = {
            key: cuts[key].held if key in cuts else EVERYTHING
            for key in shapes
            if parts[key].kind in ("A", "B")
        }
        whole = all(held == EVERYTHING for held in self._held.values())
        self._one_run = one_run and whole and len(self._held) == len(parts)
        sizes: dict[str, list[int]] = {}
        held_shapes: dict[str, Shape] = {}
        for key, held in self._held.items():
            rows, columns = shapes[key]
            held_shapes[key] = count(held, rows) if cuts else rows, columns
            sizes[key] = _cut(held_shapes[key][0] * columns)

        def slot_offset(key: str) -> int:
            (layer, module), kind = parts[key]
            place = slot.places[layer, module]
            return place.a if kind == "A" else place.b

        in_order = sorted(self._held, key=slot_offset)
        first: dict[str, int] = {}
        self._image_sizes: list[int] = []
        self._where: dict[Place, dict[str, tuple[int, Shape]]] = {}
        self.elements = 0
        """Size of the matrices."""
        for key in in_order:
            first[key] = len(self._image_sizes)
            self._image_sizes += sizes[key]
            where = self._where.setdefault(parts[key].place, {})
            where[parts[key].kind] = self.elements, held_shapes[key]
            self.elements += sum(sizes[key])
        self._sizes = [size for key in self._held for size in sizes[key]]
        self._places: list[int] = []
        """The piece of the image for each piece of the file."""
        self._factors: list[float] = []
        """For each piece of the file."""
        for key in self._held:
            self._places += range(first[key], first[key] + len(sizes[key]))
            factor = layout.targets[parts[key].place].scaling if parts[key].kind == "B" else 1.0
            self._factors += [factor] * len(sizes[key])
        self._scaled: dict[float, list[int]] = {}
        """Pieces of the image by their factor."""
        for place, factor in zip(self._places, self._factors, strict=True):
            if factor != 1.0:
                self._scaled.setdefault(factor, []).append(place)
        self.largest_factor = max(map(abs, self._factors), default=1.0)
        self.rank = max(target.rank for target in layout.targets.values())
        """The largest rank of a module."""
        self.others = [(key, part) for key, part in parts.items() if key not in self._held]
        """What the file has beside matrices."""
        affine = {part.place for _, part in self.others if part.kind in ("bias", "magnitude")}
        self.room = sum(2 * slot.places[place].num_outputs for place in affine)
        """Elements behind the matrices, for gains and shifts."""
        self.shape: ImageShape | None = None
        """The image's shape, if it is the matrices of layers and nothing else."""
        if not self.others and all(part.place[0] != NO_LAYER for part in parts.values()):
            ranks = {place: (both["A"][1][0], both["B"][1][1]) for place, both in self._where.items()}
            self.shape = image_shape(slot, ranks, (), dtype)

    def fill(self, weights: Weights, allocate: Allocate) -> tuple[Tensor, Matrices]:
        """Return a new image, and the matrices in it."""
        image = image_memory(self.elements + self.room, self._dtype, allocate)
        pieces = image.split_with_sizes([*self._image_sizes, self.room])
        targets, sources = [pieces[place] for place in self._places], self._sources(weights)
        if self._one_run or {source.dtype for source in sources} == {self._dtype}:
            torch._foreach_copy_(targets, sources)
            for factor, places in self._scaled.items():
                # As a tensor, because a number would be rounded to the image's dtype first.
                scalar = torch.tensor(factor, dtype=torch.float32)
                torch._foreach_mul_([pieces[place] for place in places], scalar)
        else:
            for source, factor, target in zip(sources, self._factors, targets, strict=True):
                target.copy_(source if factor == 1.0 else source.float() * factor)
        return image, Matrices(image, self._where)

    def _sources(self, weights: Weights) -> list[Tensor]:
        if self._one_run:
            return list(weights.runs[0].split_with_sizes(self._sizes))
        held = (contiguous(take(weights.tensors[key], rows)) for key, rows in self._held.items())
        return [piece for tensor in held for piece in serial_pieces(tensor.view(-1)) if len(piece)]


class Contents(NamedTuple):
    """Contents of a weights file, and which parts of it are read."""

    layout: Layout
    parts: Mapping[str, Part]
    cuts: Mapping[str, Cut]
    """Which part of each tensor is read; empty if the tensors are read whole."""
    plan: ImagePlan
    entries: Sequence[Entry] = ()
    """The tensors that are read, in memory order."""
    pieces: Sequence[tuple[int, int]] = ()
    """Offsets and lengths of the tensors in the file's data, in bytes, in the same order."""

    @classmethod
    def of_file(
        cls,
        slot: SlotLayout,
        dtype: torch.dtype,
        layout: Layout,
        parts: Mapping[str, Part],
        entries: Sequence[Entry],
    ) -> Contents:
        """Return the contents of a file with these ``entries``."""
        pieces: Sequence[tuple[int, int]] = [(0, sum(entry.nbytes for entry in entries))]
        cuts: Mapping[str, Cut] = {}
        if slot.shard.size > 1:
            cuts = cuts_of(slot, layout, parts)
            entries, pieces = select(entries, cuts)
        shapes = {entry.key: entry.shape for entry in entries}
        one_run = all(entry.dtype == dtype for entry in entries)
        plan = ImagePlan(slot, dtype, layout, parts, cuts, shapes, one_run=one_run)
        return cls(layout, parts, cuts, plan, entries, pieces)

    @classmethod
    def of_tensors(
        cls,
        slot: SlotLayout,
        dtype: torch.dtype,
        layout: Layout,
        parts: Mapping[str, Part],
        tensors: Mapping[str, Tensor],
    ) -> tuple[Contents, Weights]:
        """Return the contents of ``tensors``, and the parts of these that the rank needs."""
        cuts: Mapping[str, Cut] = {}
        if slot.shard.size > 1:
            cuts = cuts_of(slot, layout, parts)
            tensors = {key: contiguous(cuts[key].of(tensor)) for key, tensor in tensors.items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        plan = ImagePlan(slot, dtype, layout, parts, cuts, shapes, one_run=False)
        return cls(layout, parts, cuts, plan), Weights(list(tensors.values()), lambda: tensors)


class KnownContents:
    """The contents of the latest few files, by configuration, header and size of the data. Used by several
    threads."""

    SIZE = 8

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._by_text: dict[tuple[PeftLoraConfig, bytes, int], Contents] = {}
        self._lock = Lock()

    def get(self, key: tuple[PeftLoraConfig, bytes, int]) -> Contents | None:
        return self._by_text.get(key)

    def put(self, key: tuple[PeftLoraConfig, bytes, int], contents: Contents) -> None:
        with self._lock:
            while len(self._by_text) >= self.SIZE:
                del self._by_text[next(iter(self._by_text))]
            self._by_text[key] = contents

    def is_new(self, text: str) -> bool:
        """Whether a warning is given for the first time. None is new after the first few."""
        with self._lock:
            new = text not in self._said and len(self._said) < MAX_WARNINGS
            self._said |= {text} if new else set()
        return new


def contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor itself if it is contiguous, else a copy."""
    if tensor.is_contiguous():
        return tensor
    copied = torch.empty(tensor.shape, dtype=tensor.dtype)
    pairs = list(serial_copies(tensor, copied.view(-1)))
    torch._foreach_copy_([to for to, _ in pairs], [values for _, values in pairs])
    return copied


def _cut(elements: int) -> list[int]:
    return [min(SERIAL_ELEMENTS, elements - begin) for begin in range(0, elements, SERIAL_ELEMENTS)]
