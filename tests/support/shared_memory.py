"""The memory of KV blocks, and perhaps of adapters, as a device would hold it: who wrote what where."""

from __future__ import annotations

from aioengine.core import CopyMove
from aioengine.core.adapters.arena import GRANULE, rounded
from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry
from aioengine.step import StepBatch

Cell = tuple[object, ...] | None


class DeviceMemory:
    """One cell for each granule: a block has as many as it has tokens.

    A cell holds the key of a token, which depends on all tokens before it, or a part of an adapter. What a
    copy will write is spoilt from its beginning to its end, so a step that reads or writes there is noticed.
    """

    def __init__(self, limits: CoreLimits) -> None:
        self.shared = limits.shared_block_bytes is not None
        """Whether adapters are in it, too."""
        assert not self.shared or limits.shared_block_bytes == GRANULE * limits.block_size
        self.window = limits.window
        self.block_size = limits.block_size
        self.cells: list[Cell] = [None] * (limits.num_blocks * limits.block_size)
        self.at: dict[int, tuple[int, int]] = {}
        """(first cell, uid) of the adapter in each slot, as the device knows it."""

    def begin(self, move: CopyMove) -> None:
        if not self.shared:
            return
        assert move.offset is not None
        self._fill(move.offset // GRANULE, move.entry, ("being written",))

    def finish(self, move: CopyMove) -> None:
        if not self.shared:
            return
        assert move.offset is not None
        first, uid = move.offset // GRANULE, move.entry.uid
        for i in range(first, first + _size(move.entry)):
            assert self.cells[i] == ("being written", uid, i - first), "a copy was overwritten"
        self._fill(first, move.entry, ("adapter",))
        self.at[move.slot] = first, uid

    def _fill(self, first: int, entry: AdapterEntry, what: tuple[str]) -> None:
        for i in range(_size(entry)):
            self.cells[first + i] = (*what, entry.uid, i)

    def execute(self, batch: StepBatch, slots: list[AdapterEntry | None]) -> None:
        """Move, read and write as a step does. ``slots``: which adapter each slot is to hold for it."""
        for move in batch.moves:
            to, source, count = (n // GRANULE for n in (move.to, move.source, move.nbytes))
            self.cells[to : to + count] = self.cells[source : source + count]
            if move.slot is not None:
                first, uid = self.at[move.slot]
                assert first == source
                self.at[move.slot] = to, uid
        for work in batch.sequences:
            if work.slot >= 0 and self.shared:
                entry = slots[work.slot]
                assert entry is not None
                first, uid = self.at[work.slot]
                found = self.cells[first : first + _size(entry)]
                assert found == [("adapter", entry.uid, i) for i in range(_size(entry))], "not its adapter"
            history = [*work.history[: work.start], *work.tokens]
            key = None if work.slot < 0 else slots[work.slot]
            for position in range(len(history)):
                cell = work.block_table[position // self.block_size] * self.block_size
                cell += position % self.block_size
                true = "key", None if key is None else key.digest, hash(tuple(history[: position + 1]))
                if position < work.start:
                    found_there = self.cells[cell]
                    if self.window is None or position > work.start - self.window:
                        assert found_there == true, "a key is not what was computed"
                    else:
                        assert found_there is not None and found_there[0] == "key", "it may not be finite"
                else:
                    self.cells[cell] = true


def _size(entry: AdapterEntry) -> int:
    return rounded(entry.slot_nbytes) // GRANULE
