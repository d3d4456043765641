"""One memory on the device, for adapters and KV blocks alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aioengine.model.buffer import Buffer
from aioengine.model.slots.pool import LoRASlots
from aioengine.step import STAGE_BYTES, MemoryMove


class SharedMemory:
    """``num_blocks`` blocks of ``block_bytes``, any of which may hold adapters in place of keys and values.

    Who has what is the core's business (:mod:`aioengine.core.border`); this only holds and moves it.
    """

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device) -> None:
        nbytes = num_blocks * block_bytes
        if device.type == "cpu":
            self.tensor = Buffer(nbytes).tensor
        else:
            self.tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._stage = torch.empty(STAGE_BYTES, dtype=torch.uint8, device=device)

    def apply(self, moves: Sequence[MemoryMove], slots: LoRASlots) -> None:
        """Carry out a step's moves in order, before anything of the step reads them. Call it on the step's
        thread and stream."""
        for move in moves:
            self._move(move)
            if move.slot is not None:
                slots.relocate(move.slot, move.to)

    def _move(self, move: MemoryMove) -> None:
        to, source = (self.tensor[at : at + move.nbytes] for at in (move.to, move.source))
        if abs(move.to - move.source) >= move.nbytes:
            to.copy_(source)
            return
        # Piece by piece through other memory, from the end that is not overwritten first.
        begins = range(0, move.nbytes, STAGE_BYTES)
        for begin in begins if move.to < move.source else reversed(begins):
            end = min(begin + STAGE_BYTES, move.nbytes)
            piece = self._stage[: end - begin]
            piece.copy_(source[begin:end])
            to[begin:end].copy_(piece)
