"""Decides which parts of a file's tensors a rank reads, and which of those its slots hold.

The two differ only where a value depends on more than the part that a rank holds: DoRA's norms, and the
comparison of tied adapters. All ranks together read every value, so it is enough that each checks what it
reads. A rank that is alone reads and holds everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from aioengine.adapters.peft.part import Part
from aioengine.adapters.peft.targets import Layout
from aioengine.adapters.peft.weights_file import Entry
from aioengine.model.parallel.ranges import EVERYTHING, Ranges, take
from aioengine.model.slots.layout import SlotLayout


class Cut(NamedTuple):
    """Part of a tensor [rows, columns] or [rows]."""

    rows: Ranges = EVERYTHING
    """The rows that are read."""
    columns: slice = slice(None)
    held: Ranges = EVERYTHING
    """Which of the rows that are read the slot holds."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part that is read, as a view if it is one."""
        return take(tensor if tensor.dim() == 1 else tensor[:, self.columns], self.rows)


def cuts_of(slot: SlotLayout, layout: Layout, parts: Mapping[str, Part]) -> dict[str, Cut]:
    """Return which part of each tensor the rank of ``slot`` needs, by key."""
    whole = layout.dora or layout.tied
    return {key: _cut_of(slot, part, needs_more=whole) for key, part in parts.items()}


def _cut_of(slot: SlotLayout, part: Part, *, needs_more: bool) -> Cut:
    """Return which part of a tensor the rank of ``slot`` needs; ``needs_more`` for DoRA and tied adapters.

    DoRA's norms need whole rows of B A for the outputs that the rank computes or, where a linear is split
    over its inputs, all rows for the inputs that the rank has.
    """
    if part.is_whole or slot.shard.size == 1:
        return Cut()
    module = part.place[1]
    share, splits_inputs = slot.share(module), slot.partition.splits_inputs(module)
    match part.kind:
        case "A":
            rows, columns = (share.a[0],), share.a[1]
            more = needs_more and not splits_inputs
            return Cut(columns=columns, held=rows) if more else Cut(rows, columns)
        case "B":
            return Cut(held=share.b) if needs_more and splits_inputs else Cut(share.b)
        case "base":
            return Cut((slot.partition.vocabulary,))
    return Cut(share.outputs)


def select(entries: Sequence[Entry], cuts: Mapping[str, Cut]) -> tuple[list[Entry], list[tuple[int, int]]]:
    """Return the parts of ``entries`` that are read, as they lie in memory after the read; and offsets and
    lengths of these parts in the file's data, in bytes, in the same order."""
    found: list[Entry] = []
    pieces: list[tuple[int, int]] = []
    end = 0
    for entry in entries:
        cut = cuts[entry.key]
        rows = [range(entry.shape[0])[part] for part in cut.rows]
        width = range(entry.shape[1])[cut.columns] if len(entry.shape) > 1 else range(1)
        height = sum(map(len, rows))
        nbytes = height * len(width) * entry.dtype.itemsize
        found.append(entry._replace(shape=(height, len(width))[: len(entry.shape)], begin=end, nbytes=nbytes))
        end += nbytes
        for begin, length in (run for part in rows for run in _runs(entry, part, width)):
            if pieces and sum(pieces[-1]) == begin:
                pieces[-1] = pieces[-1][0], pieces[-1][1] + length
            else:
                pieces.append((begin, length))
    return found, pieces


def _runs(entry: Entry, rows: range, columns: range) -> Iterator[tuple[int, int]]:
    if not rows or not columns:
        return
    size = entry.dtype.itemsize
    pitch = entry.nbytes // entry.shape[0]
    length = len(columns) * size
    if rows.step == 1 and length == pitch:
        yield entry.begin + rows.start * pitch, len(rows) * pitch
        return
    for row in rows:
        yield entry.begin + row * pitch + columns.start * size, length
