"""Cuts a step's query tokens into tiles, over which the attention kernel's grid runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.attention import AttentionPlan, Span
from aioengine.kernels.transfer import send
from aioengine.kernels.triton.launch import power_of_two

FEW_ROWS = 16
"""Minimum rows (tokens times query heads of a key head) of tiles for decoding."""


def rows_of_prompts(bits: int, head_dim: int, capability: int) -> int:
    """Return the rows of a tile of a long chunk: if registers allow for it 16 for each of 8 warps, so that
    none needs the weights of keys that another one has. So do those of data centers' GPUs from Hopper on,
    whose products take keys and values out of shared memory."""
    if bits > 16:
        return FEW_ROWS
    return 128 if head_dim <= 128 and capability // 10 in (9, 10) else 64


class Tiles(NamedTuple):
    """Tiles that one launch runs over."""

    table: Tensor
    """[N, 4] int32: sequence, first row, tokens, position of the first. One without tokens is padding, whose
    row becomes 0; with fewer there is no row either."""
    block_m: int
    """Rows of a tile, a power of two."""
    longest: int
    """Maximum number of keys that a tile may attend to."""


def cut(spans: Iterable[tuple[int, Span]], rows: int, group: int) -> list[tuple[int, int, int, int]]:
    """Cut spans, with the index of their sequence, into tiles of at most ``rows`` rows: ``group`` for a
    token."""
    size = rows // group
    return [
        (i, row + at, min(size, length - at), start + at)
        for i, (row, length, start) in spans
        for at in range(0, length, size)
    ]


class QueryTiles:
    """The tiles of one step on its device, for all layers; see :func:`cut`.

    A span that fits into a tile of few rows gets one; longer chunks are cut into tiles of many rows.
    """

    def __init__(self, plan: AttentionPlan) -> None:
        self._spans, self._device = plan.spans, plan.device  # not the plan, which holds this
        self._arrivals = torch.empty(0, dtype=torch.int32, device=plan.device)
        self._made: dict[tuple[int, int], list[Tiles]] = {}

    def of(self, group: int, rows: int) -> list[Tiles]:
        """Return the launches for models with ``group`` query heads for each key head; long chunks are in
        tiles of ``rows``."""
        key = group, rows
        if key not in self._made:
            few, many = (max(at_least, power_of_two(group)) for at_least in (FEW_ROWS, rows))
            limit = few // group
            short = [(i, span) for i, span in enumerate(self._spans) if span.length <= limit]
            long = [(i, span) for i, span in enumerate(self._spans) if span.length > limit]
            cuts = [(cut(short, few, group), few), (cut(long, many, group), many)]
            cuts = [(tiles, block_m) for tiles, block_m in cuts if tiles]
            tables = send([torch.tensor(tiles, dtype=torch.int32) for tiles, _ in cuts], self._device)
            self._made[key] = [
                Tiles(table, block_m, max(tokens + position for _, _, tokens, position in tiles))
                for table, (tiles, block_m) in zip(tables, cuts, strict=True)
            ]
        return self._made[key]

    def arrivals(self, count: int) -> Tensor:
        """Return [>= count] int32 zeros. A kernel that counts in them sets them to zero again, for the next
        layer."""
        if self._arrivals.shape[0] < count:
            self._arrivals = torch.zeros(count, dtype=torch.int32, device=self._device)
        return self._arrivals
