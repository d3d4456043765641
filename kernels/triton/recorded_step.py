"""The metadata of decode steps at fixed addresses, so that a recorded CUDA graph can read it.

One buffer holds everything that differs from step to step. It is written on the host and copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.attention import AttentionPlan, Span
from aioengine.kernels.plan.derived import Derivable
from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.transfer import HostBuffer
from aioengine.kernels.triton.launch import power_of_two
from aioengine.kernels.triton.plan import TilePlan, cut
from aioengine.kernels.triton.query_tiles import FEW_ROWS, QueryTiles, Tiles
from aioengine.kernels.triton.query_tiles import cut as cut_queries
from aioengine.kernels.triton.table import SHORT


class RecordedShape(NamedTuple):
    """Sizes that the tables of recorded steps depend on."""

    table_width: int
    """Most blocks of a sequence."""
    block_size: int
    slots: int
    max_rank: int
    group: int
    """Query heads of a key head."""


class _Fields(NamedTuple):
    token_ids: Tensor
    """[size] int64"""
    positions: Tensor
    """[size] int64"""
    cells: Tensor
    """[size] int64; -1: nothing is stored"""
    tables: Tensor
    """[size, width] int32"""
    queries: Tensor
    """[size, 4] int32: tiles of queries"""
    tiles: Tensor
    """[..., 4] int32: tiles of adapters' tokens"""
    affine_tiles: Tensor
    """The same of the slots that scale or shift."""


class RecordedStep:
    """Steps of up to ``size`` sequences with one token each, which ask for the next; rows beyond them are
    padding. A padding row changes no other row: it is token 0, stores nothing, attends to no key, and has no
    adapter.
    """

    def __init__(self, size: int, shape: RecordedShape, device: torch.device | str) -> None:
        device = torch.device(device)
        self.size, self._shape = size, shape
        self._query_rows = max(FEW_ROWS, power_of_two(shape.group))
        most = most_tiles(size, shape.slots)
        fields: list[tuple[tuple[int, ...], torch.dtype]] = [((size,), torch.int64)] * 3
        fields += [((size, shape.table_width), torch.int32)]
        fields += [((height, 4), torch.int32) for height in (size, most, most)]
        self._buffer = HostBuffer(fields, device)
        self._host, there = _Fields(*self._buffer.host), _Fields(*self._buffer.device)
        for tensor in self._host:
            tensor.zero_()
        self._tables = _KnownTables(self._host.tables)
        self.token_ids, self.rows = there.token_ids, torch.arange(size, device=device)
        queries = Tiles(there.queries, self._query_rows, shape.table_width * shape.block_size)
        self.attention: AttentionPlan = _RecordedAttention(there, shape.block_size, queries)
        self.plans = {"base": LoRABatch([], [], [], device)}
        """Adapters of the tokens, by the kind of step: "base" without adapters, "lora", and "affine" with
        some that scale or shift."""
        tiles = _RecordedTiles(device, there.tiles, there.affine_tiles)
        for kind in ("lora", "affine"):  # with any possible content; the tiles say what it is
            batch = LoRABatch([0], [size], [shape.max_rank], device, slot_affine=[kind == "affine"])
            batch.provide(TilePlan, tiles)
            self.plans[kind] = batch

    @property
    def table_width(self) -> int:
        return self._shape.table_width

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
        """Write a step of at most ``size`` sequences, in the order of the slots of ``lora``."""
        self._buffer.wait()
        host, size = self._host, self._shape.block_size
        pairs = zip(positions, tables, strict=True)
        cells = [table[place // size] * size + place % size for place, table in pairs]
        _write(host.token_ids, token_ids)
        _write(host.positions, positions)
        _write(host.cells, cells, padding=-1)
        self._tables.write(tables)
        spans = ((i, Span(i, 1, place)) for i, place in enumerate(positions))
        queries = cut_queries(spans, self._query_rows, self._shape.group)
        # A padding row becomes 0 by a tile of its own.
        _write(host.queries, [*queries, *((i, i, 0, 0) for i in range(len(queries), self.size))])
        _write(host.tiles, cut(lora.segments, SHORT))
        _write(host.affine_tiles, cut(lora.affine, SHORT))
        self._buffer.send()


def most_tiles(size: int, slots: int) -> int:
    """Return the largest number of tiles of ``SHORT`` tokens for ``size`` tokens over ``slots`` adapters."""
    segments = min(size, slots)
    return segments + (size - segments) // SHORT


class _KnownTables:
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


def _write(target: Tensor, values: Sequence[int] | Sequence[tuple[int, ...]], padding: int = 0) -> None:
    """Write rows from the first on; those behind them become ``padding``."""
    if values:
        target[: len(values)] = torch.tensor(values, dtype=target.dtype)
    target[len(values) :] = padding


class _RecordedAttention(AttentionPlan):
    """A plan without spans on the host; only a backend that does not read them can use it."""

    def __init__(self, fields: _Fields, block_size: int, queries: Tiles) -> None:
        Derivable.__init__(self)
        self.spans = ()
        self.block_size, self.device = block_size, fields.tables.device
        self.positions, self.cells, self.tables = fields.positions, fields.cells, fields.tables
        tiles: QueryTiles = _RecordedQueryTiles(self, queries)
        self.provide(QueryTiles, tiles)


class _RecordedQueryTiles(QueryTiles):
    def __init__(self, plan: AttentionPlan, tiles: Tiles) -> None:
        super().__init__(plan)
        self._all = [tiles]

    def of(self, group: int, rows: int) -> list[Tiles]:
        return self._all


class _RecordedTiles(TilePlan):
    def __init__(self, device: torch.device, tiles: Tensor, affine: Tensor) -> None:
        super().__init__(LoRABatch([], [], [], device))
        self._all, self._affine = tiles, affine
        self.longest = SHORT

    def tiles(self, length: int) -> Tensor:
        assert length >= SHORT
        return self._all

    def affine_tiles(self, length: int) -> Tensor:
        assert length >= SHORT
        return self._affine
