"""The metadata of decode steps at fixed addresses, so that a recorded CUDA graph can read it.

One buffer holds everything that differs from step to step. It is written on the host and copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.plan.derived import Derivable
from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.transfer import HostBuffer
from aioengine.kernels.triton.launch import power_of_two
from aioengine.kernels.triton.plan import TilePlan, cut
from aioengine.kernels.triton.query_tiles import FEW_ROWS, QueryTiles, Tiles
from aioengine.kernels.triton.table import SHORT


class _Fields(NamedTuple):
    token_ids: Tensor
    """[size] int64"""
    positions: Tensor
    """[size] int64"""
    cells: Tensor
    """[size] int64; -1: nothing is stored"""
    tables: Tensor
    """[size, width] int32"""
    query_tiles: Tensor
    """[size, 4] int32: sequence, row, 1 or 0 tokens, position"""
    tiles: Tensor
    """[most_tiles, 4] int32: slot, first token, tokens, rank"""
    affine_tiles: Tensor
    """The same, of the slots that scale or shift."""


class FixedStep:
    """Steps of up to ``size`` sequences with one token each; the rows beyond them are padding.

    A padding row changes no other row: it is token 0, stores nothing, attends to no key, and has no adapter.
    A sequence has at most ``table_width`` blocks; the pool has ``slots`` slots of ``max_rank``.
    """

    def __init__(
        self,
        size: int,
        *,
        table_width: int,
        block_size: int,
        slots: int,
        max_rank: int,
        device: torch.device | str,
    ) -> None:
        device = torch.device(device)
        rows, tiles = (size, 4), (most_tiles(size, slots), 4)
        long, int32 = torch.int64, torch.int32
        fields = [((size,), long)] * 3 + [((size, table_width), int32), (rows, int32)] + [(tiles, int32)] * 2
        self.size = size
        self._buffer = HostBuffer(fields, device)
        self._host = _Fields(*self._buffer.host)
        self._tables = KnownTables(self._host.tables)
        there = _Fields(*self._buffer.device)
        self.token_ids = there.token_ids
        self.rows = torch.arange(size, device=device)
        """[size] every row: all of them are asked for a token."""
        self.attention: AttentionPlan = _FixedAttention(there, block_size)
        fixed = _FixedTiles(there, device)
        self.base = LoRABatch([], [], [], device)
        """Plan of steps without adapters."""
        self.lora = _lora_batch(size, max_rank, device, fixed, affine=False)
        """Plan of steps with adapters."""
        self.affine = _lora_batch(size, max_rank, device, fixed, affine=True)
        """Plan of steps with adapters that scale or shift."""
        self._host.tables.zero_()
        self.fill([], [], [], LoRABatch([], [], []))

    @property
    def table_width(self) -> int:
        return self._host.tables.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self._buffer.nbytes + self.rows.nbytes

    def fill(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        lora: LoRABatch,
    ) -> None:
        """Write the step of these sequences, at most ``size``, in the order of ``lora``'s slots."""
        self._buffer.wait()
        host, count, block_size = self._host, len(token_ids), self.attention.block_size
        places = zip(tables, positions, strict=True)
        cells = [table[at // block_size] * block_size + at % block_size for table, at in places]
        write(host.token_ids, token_ids)
        write(host.positions, positions)
        write(host.cells, cells, padding=-1)
        padding = [(i, i, 0, 0) for i in range(count, self.size)]
        write(host.query_tiles, [*((i, i, 1, at) for i, at in enumerate(positions)), *padding])
        write(host.tiles, cut(lora.segments, SHORT))
        write(host.affine_tiles, cut(lora.affine, SHORT))
        self._tables.write(tables)
        self._buffer.send()


def most_tiles(size: int, slots: int, length: int = SHORT) -> int:
    """Return the largest number of tiles of ``length`` tokens for ``size`` tokens over ``slots`` adapters."""
    segments = min(size, slots)
    return segments + (size - segments) // length


class KnownTables:
    """Block tables in memory of the host, of which only those that have changed are written."""

    def __init__(self, host: Tensor) -> None:
        self._host = host
        """[sequences, width] int32"""
        self._known: list[list[int]] = [[]] * len(host)

    def write(self, tables: Sequence[Sequence[int]]) -> None:
        for i, table in enumerate(tables):
            if not isinstance(table, list):  # no other sequence equals a list
                table = list(table)
            if self._known[i] != table:
                self._host[i, : len(table)] = torch.tensor(table, dtype=torch.int32)
                self._known[i] = list(table)


def write(target: Tensor, values: Sequence[int] | Sequence[tuple[int, ...]], padding: int = 0) -> None:
    """Write rows from the first on; those behind them become ``padding``."""
    if values:
        target[: len(values)] = torch.tensor(values, dtype=target.dtype)
    target[len(values) :] = padding


def _lora_batch(
    size: int, max_rank: int, device: torch.device, tiles: TilePlan, *, affine: bool
) -> LoRABatch:
    """Make a batch with any possible content; its tiles say what it contains."""
    batch = LoRABatch([0], [size], [max_rank], device, slot_affine=[affine])
    batch.provide(TilePlan, tiles)
    return batch


class _FixedAttention(AttentionPlan):
    """A plan without spans on the host; only a backend that does not read them can use it."""

    def __init__(self, fields: _Fields, block_size: int) -> None:
        Derivable.__init__(self)
        self.spans = ()
        self.block_size, self.device = block_size, fields.tables.device
        self.positions, self.cells, self.tables = fields.positions, fields.cells, fields.tables
        tiles: QueryTiles = _FixedQueryTiles(self, fields.query_tiles)
        self.provide(QueryTiles, tiles)


class _FixedQueryTiles(QueryTiles):
    def __init__(self, plan: AttentionPlan, table: Tensor) -> None:
        super().__init__(plan)
        self._table, self._longest = table, plan.tables.shape[1] * plan.block_size

    def of(self, group: int, rows: int) -> list[Tiles]:
        return [Tiles(self._table, max(FEW_ROWS, power_of_two(group)), self._longest)]


class _FixedTiles(TilePlan):
    def __init__(self, fields: _Fields, device: torch.device) -> None:
        super().__init__(LoRABatch([], [], [], device))
        self._fields = fields
        self.longest = SHORT

    def tiles(self, length: int) -> Tensor:
        assert length >= SHORT
        return self._fields.tiles

    def affine_tiles(self, length: int) -> Tensor:
        assert length >= SHORT
        return self._fields.affine_tiles
