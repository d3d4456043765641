"""Cuts a step's segments into tiles, over which the kernels' grids run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from aioengine.kernels.plan.lora import LoRABatch, Segment


def padded(count: int) -> int:
    """Round ``count`` up to one of few sizes: all up to 8, then four for each doubling.

    A captured CUDA graph has a fixed grid, so steps of one size can share a graph; at most a fifth of the
    tiles are padding.
    """
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def cut(segments: Iterable[Segment], length: int) -> list[tuple[int, int, int, int]]:
    """Cut the segments into tiles of at most ``length`` tokens: (slot, first token, tokens, rank)."""
    return [
        (slot, first, min(length, stop - first), rank)
        for slot, start, stop, rank, _ in segments
        for first in range(start, stop, length)
    ]


class TilePlan:
    """The tiles of one batch on its device, made on first use and kept for all layers of the step.

    Nothing here waits for the device: the lists are built from data on the host, and are copied from
    page-locked memory.
    """

    def __init__(self, batch: LoRABatch) -> None:
        self._segments = {"all": batch.segments, "affine": batch.affine}  # not the batch, which holds this
        self._device = batch.device
        self._tiles: dict[tuple[str, int], Tensor] = {}
        self._arrivals = torch.empty(0, dtype=torch.int32, device=batch.device)
        self.longest = max((s.stop - s.start for s in batch.segments), default=0)
        """Tokens of the longest segment."""

    def tiles(self, length: int) -> Tensor:
        """[N, 4] int32 of ``batch.segments``, see :func:`cut`; tiles of zero tokens pad it."""
        return self._table("all", length)

    def affine_tiles(self, length: int) -> Tensor:
        """Return the same of ``batch.affine``."""
        return self._table("affine", length)

    def _table(self, name: str, length: int) -> Tensor:
        table = self._tiles.get((name, length))
        if table is None:
            rows = cut(self._segments[name], length)
            rows += [(0, 0, 0, 0)] * (padded(len(rows)) - len(rows))
            host = torch.tensor(rows, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            table = self._tiles[name, length] = host.to(self._device, non_blocking=True)
        return table

    def arrivals(self, count: int) -> Tensor:
        """Return [>= count] int32 zeros. A kernel that counts in them sets them to zero again, for the next
        layer."""
        if self._arrivals.shape[0] < count:
            self._arrivals = torch.zeros(count, dtype=torch.int32, device=self._device)
        return self._arrivals
