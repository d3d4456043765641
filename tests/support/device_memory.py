"""The memory of KV blocks as a device would hold it: which key was written where."""

from __future__ import annotations

from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry
from aioengine.step import StepBatch


class DeviceMemory:
    """One cell for each token of each block, which holds the key of a token: it depends on all tokens before
    it."""

    def __init__(self, limits: CoreLimits) -> None:
        self.block_size = limits.block_size
        self.cells: list[tuple[object, ...] | None] = [None] * (limits.num_blocks * limits.block_size)

    def execute(self, batch: StepBatch, slots: list[AdapterEntry | None]) -> None:
        """Read and write as a step does. ``slots``: which adapter each slot is to hold for it."""
        for work in batch.sequences:
            history = [*work.history[: work.start], *work.tokens]
            key = None if work.slot < 0 else slots[work.slot]
            for position in range(len(history)):
                cell = work.block_table[position // self.block_size] * self.block_size
                cell += position % self.block_size
                true = "key", None if key is None else key.digest, hash(tuple(history[: position + 1]))
                if position < work.start:
                    assert self.cells[cell] == true, "a key is not what was computed"
                else:
                    self.cells[cell] = true
