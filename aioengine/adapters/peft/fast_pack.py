"""Fast path for plain A/B files that are already in the slots' dtype.

Adapters that were trained alike have the same configuration and the same header, and differ only in their
data. So everything but the data is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig
from aioengine.adapters.peft.pack import Packed, SlotOrder, largest_magnitude
from aioengine.adapters.peft.shard_reads import Cut, cut_of, select
from aioengine.adapters.peft.targets import Layout, Part, Place
from aioengine.adapters.peft.weights_file import Entry
from aioengine.model.buffer import Allocate
from aioengine.model.slots.image import SERIAL_ELEMENTS, ImageShape, image_memory, image_shape
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import NO_LAYER

MAX_WARNINGS = 64
"""Maximum number of warnings about expressions that RE2 does not take."""


class Contents(NamedTuple):
    """Contents of a safetensors file by its header, and which parts of it are read."""

    layout: Layout
    entries: Sequence[Entry]
    """The tensors that are read, in memory order."""
    pieces: Sequence[tuple[int, int]]
    """Offsets and lengths of the tensors in the file's data, in bytes, in the same order."""
    cuts: Mapping[str, Cut]
    """Which part of each tensor is read; empty if the tensors are read whole."""
    parts: Mapping[str, Part]
    shortcut: Shortcut | None
    """None if the file does not qualify for the fast path."""

    @classmethod
    def of(
        cls, order: SlotOrder, dtype: torch.dtype, entries: Sequence[Entry],
        parts: Mapping[str, Part], layout: Layout,
    ) -> Contents:  # fmt: skip
        """Build the contents from the ``entries`` of a file."""
        pieces: Sequence[tuple[int, int]] = [(0, sum(entry.nbytes for entry in entries))]
        cuts: dict[str, Cut] = {}
        if order.layout.shard.size > 1:
            cuts = cuts_of(order.layout, parts, layout)
            entries, pieces = select(entries, cuts)
        return cls(layout, entries, pieces, cuts, parts, Shortcut.of(order, dtype, entries, parts, layout))


def cuts_of(slot: SlotLayout, parts: Mapping[str, Part], layout: Layout) -> dict[str, Cut]:
    """Which part of each tensor the rank of ``slot`` needs, by key."""
    return {key: cut_of(slot, part, dora=layout.dora, tied=layout.tied) for key, part in parts.items()}


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


class Shortcut:
    """Copies a file's data to a slot image in one pass.

    Both are cut into the same pieces, small enough that torch stays in the calling thread; ``_places`` maps
    each piece of the file to its piece of the image.
    """

    def __init__(
        self, slot: SlotLayout, dtype: torch.dtype, entries: Sequence[Entry], parts: Mapping[str, Part],
        layout: Layout,
    ) -> None:  # fmt: skip
        def offset(index: int) -> int:
            (layer, module), kind = parts[entries[index].key]
            place = slot.places[layer, module]
            return place.a if kind == "A" else place.b

        pieces = [list(_cut(entry.shape[0] * entry.shape[1])) for entry in entries]
        order = sorted(range(len(entries)), key=offset)
        first = {}
        begin = 0
        for index in order:
            first[index] = begin
            begin += len(pieces[index])
        self._sizes = [size for cut in pieces for size in cut]
        self._image_sizes = [size for index in order for size in pieces[index]]
        self._places = [first[index] + n for index, cut in enumerate(pieces) for n in range(len(cut))]
        self._scaled: dict[float, list[int]] = {}
        self._tensors: dict[Place, list[tuple[int, tuple[int, ...]]]] = {}
        begins = dict(
            zip(order, accumulate((sum(pieces[index]) for index in order), initial=0), strict=False)
        )
        for index, entry in enumerate(entries):
            part = parts[entry.key]
            both = self._tensors.setdefault(part.place, [(0, ()), (0, ())])
            both[part.kind == "B"] = begins[index], entry.shape
            factor = layout.targets[part.place].scaling
            if part.kind == "B" and factor != 1.0:
                places = range(first[index], first[index] + len(pieces[index]))
                self._scaled.setdefault(factor, []).extend(places)
        self._largest_factor = max(map(abs, self._scaled), default=1.0)
        self._rank = max(target.rank for target in layout.targets.values())
        ranks = {place: (a[1][0], b[1][1]) for place, (a, b) in self._tensors.items()}
        self._shape: ImageShape = image_shape(slot, ranks, (), dtype)

    @classmethod
    def of(
        cls, order: SlotOrder, dtype: torch.dtype, entries: Sequence[Entry], parts: Mapping[str, Part],
        layout: Layout,
    ) -> Shortcut | None:  # fmt: skip
        """Build the shortcut for a file; None if the file needs more than copying and scaling."""
        usual = all(
            entry.dtype == dtype
            and parts[entry.key].kind in ("A", "B")
            and parts[entry.key].place[0] != NO_LAYER
            for entry in entries
        )
        return cls(order.layout, dtype, entries, parts, layout) if usual else None

    def pack(self, data: Tensor, *, allow_nonfinite: bool, allocate: Allocate) -> Packed | None:
        """Pack ``data`` [bytes that were read] in the order of a slot, with B scaled. None if the values need
        the full checks."""
        dtype = self._shape.dtype
        flat = data.view(dtype)
        if not allow_nonfinite:
            largest = largest_magnitude([flat])
            if not largest * max(1.0, self._largest_factor) <= torch.finfo(dtype).max:
                return None
        image = image_memory(self._shape.elements, dtype, allocate)
        pieces = image.split_with_sizes(self._image_sizes)
        torch._foreach_copy_([pieces[place] for place in self._places], flat.split_with_sizes(self._sizes))
        for factor, places in self._scaled.items():
            # As a tensor, because a number would be rounded to the image's dtype first.
            scalar = torch.tensor(factor, dtype=torch.float32)
            torch._foreach_mul_([pieces[place] for place in places], scalar)
        tensors = _Views(image, self._tensors)
        return Packed(tensors, {}, {}, image.nbytes, self._rank, image, self._shape)


class _Views(Mapping[Place, tuple[Tensor, Tensor]]):
    """A and B by place, created on demand."""

    def __init__(self, image: Tensor, where: Mapping[Place, Sequence[tuple[int, tuple[int, ...]]]]) -> None:
        self._image = image
        self._where = where

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor]:
        a, b = (
            self._image[begin : begin + shape[0] * shape[1]].view(shape)
            for begin, shape in self._where[place]
        )
        return a, b

    def __iter__(self) -> Iterator[Place]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _cut(elements: int) -> Iterator[int]:
    for begin in range(0, elements, SERIAL_ELEMENTS):
        yield min(SERIAL_ELEMENTS, elements - begin)
