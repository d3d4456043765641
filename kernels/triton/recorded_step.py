"""The metadata of steps at fixed addresses, so that a recorded CUDA graph can read it.

One buffer holds everything that differs from step to step. It is written on the host and copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.attention import AttentionPlan, Span
from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.transfer import HostBuffer
from aioengine.kernels.triton.launch import power_of_two
from aioengine.kernels.triton.plan import TilePlan, cut
from aioengine.kernels.triton.query_tiles import FEW_ROWS, QueryTiles, Tiles
from aioengine.kernels.triton.query_tiles import cut as cut_queries
from aioengine.kernels.triton.table import SHORT

SPARE_TILES = 16
"""Tiles of long chunks beyond those of one chunk with all tokens: the ends of others are in tiles of their
own."""
_NOTHING = (0, 0, -1, 0)
"""A tile of queries that no program works on."""


class RecordedShape(NamedTuple):
    """Sizes that the tables of recorded steps depend on."""

    sequences: int
    """Most sequences."""
    table_width: int
    """Most blocks of a sequence."""
    block_size: int
    slots: int
    max_rank: int
    group: int
    """Query heads of a key head."""
    query_rows: int
    """Rows of the tiles of long chunks in attention; see :class:`QueryTiles`."""
    lora_tokens: int
    """Tokens of the tiles of adapters."""


class _Fields(NamedTuple):
    token_ids: Tensor
    """[size] int64"""
    positions: Tensor
    """[size] int64"""
    cells: Tensor
    """[size] int64; -1: nothing is stored"""
    rows: Tensor
    """[sequences] int64: the last token of each that asks for a token"""
    tables: Tensor
    """[sequences, width] int32"""
    few: Tensor
    """[sequences, 4] int32: tiles of decodes and short chunks"""
    many: Tensor
    """[..., 4] int32: tiles of long chunks"""
    tiles: Tensor
    """[..., 4] int32: tiles of adapters' tokens, of ``lora_tokens``"""
    short_tiles: Tensor
    """The same of ``SHORT`` tokens."""
    affine_tiles: Tensor
    """The same of the slots that scale or shift."""
    sampled: Tensor
    """[..., 4] int32: tiles of the rows that ask for a token"""
    affine_sampled: Tensor
    """The same of the slots that scale or shift."""


class RecordedStep:
    """Steps of up to ``size`` tokens of up to ``shape.sequences`` sequences; rows beyond them are padding.

    With ``decodes`` each sequence has one token and asks for the next, so there are neither tiles of long
    chunks nor others for the sampled rows. A padding row changes no other row: it is token 0, stores nothing,
    attends to no key, and has no adapter.
    """

    def __init__(
        self, size: int, shape: RecordedShape, device: torch.device | str, *, decodes: bool = False
    ) -> None:
        device = torch.device(device)
        shape = shape._replace(sequences=size) if decodes else shape
        self.size, self.decodes, self._shape = size, decodes, shape
        self._few = max(FEW_ROWS, power_of_two(shape.group))
        self._many = max(shape.query_rows, power_of_two(shape.group))
        short = most_tiles(size, shape.slots)
        long = tiles = sampled = 0
        if not decodes:
            long = -(-size // (self._many // shape.group)) + SPARE_TILES
            tiles = most_tiles(size, shape.slots, shape.lora_tokens)
            sampled = most_tiles(shape.sequences, shape.slots)
        fields: list[tuple[tuple[int, ...], torch.dtype]] = [((size,), torch.int64)] * 3
        fields += [((shape.sequences,), torch.int64)]
        fields += [((shape.sequences, shape.table_width), torch.int32)]
        heights = (shape.sequences, long, tiles, short, short, sampled, sampled)
        fields += [((height, 4), torch.int32) for height in heights]
        self._buffer = HostBuffer(fields, device)
        self._host, there = _Fields(*self._buffer.host), _Fields(*self._buffer.device)
        for tensor in self._host:
            tensor.zero_()
        self._tables = _KnownTables(self._host.tables)
        self.token_ids, self.rows = there.token_ids, there.rows
        longest = shape.table_width * shape.block_size
        queries = [Tiles(there.few, self._few, longest)]
        if not decodes:
            queries.append(Tiles(there.many, self._many, longest))
        self.attention: AttentionPlan = _RecordedAttention(
            there, shape.block_size, queries, padded=not decodes
        )
        by_length = (
            {SHORT: there.short_tiles}
            if decodes
            else {shape.lora_tokens: there.tiles, SHORT: there.short_tiles}
        )
        # Mixed steps count as long as prompts are.
        plan = _RecordedTiles(device, by_length, there.affine_tiles, SHORT if decodes else SHORT + 1)
        ends = (
            plan if decodes else _RecordedTiles(device, {SHORT: there.sampled}, there.affine_sampled, SHORT)
        )
        base = LoRABatch([], [], [], device)
        self.plans = {"base": (base, base)}
        """Adapters of all tokens, and of those that ask for a token, by the kind of step: "base" without
        adapters, "lora", and "affine" with some that scale or shift."""
        for kind in ("lora", "affine"):
            own = self._batch(size, plan, device, affine=kind == "affine")
            asking = own if decodes else self._batch(shape.sequences, ends, device, affine=kind == "affine")
            self.plans[kind] = own, asking

    @property
    def table_width(self) -> int:
        return self._shape.table_width

    def fill(
        self,
        token_ids: Sequence[int],
        spans: Sequence[Span],
        tables: Sequence[Sequence[int]],
        rows: Sequence[int],
        lora: LoRABatch,
        sample_lora: LoRABatch,
    ) -> bool:
        """Write a step of at most ``size`` tokens, in the order of the slots of ``lora``; ``rows`` ask for
        tokens. Returns False if it has more tiles than there is room for; then nothing is written."""
        shape = self._shape
        limit = self._few // shape.group
        short = [(i, span) for i, span in enumerate(spans) if span.length <= limit]
        many = cut_queries(
            ((i, span) for i, span in enumerate(spans) if span.length > limit), self._many, shape.group
        )
        if len(many) > len(self._host.many):
            return False
        self._buffer.wait()
        host, size = self._host, shape.block_size
        positions: list[int] = []
        cells: list[int] = []
        for (_, length, start), table in zip(spans, tables, strict=True):
            places = range(start, start + length)
            positions += places
            cells += [table[place // size] * size + place % size for place in places]
        _write(host.token_ids, token_ids)
        _write(host.positions, positions)
        _write(host.cells, cells, padding=-1)
        _write(host.rows, rows)
        self._tables.write(tables)
        few = cut_queries(short, self._few, shape.group)
        # A padding row of a decode becomes 0 by a tile of its own; a mixed step's memory is zeroed before.
        rest = [(i, i, 0, 0) if self.decodes else _NOTHING for i in range(len(few), len(host.few))]
        _write(host.few, [*few, *rest])
        _write(host.many, [*many, *[_NOTHING] * (len(host.many) - len(many))])
        _write(host.short_tiles, cut(lora.segments, SHORT))
        _write(host.affine_tiles, cut(lora.affine, SHORT))
        if not self.decodes:
            _write(host.tiles, cut(lora.segments, shape.lora_tokens))
            _write(host.sampled, cut(sample_lora.segments, SHORT))
            _write(host.affine_sampled, cut(sample_lora.affine, SHORT))
        self._buffer.send()
        return True

    def _batch(self, size: int, tiles: TilePlan, device: torch.device, *, affine: bool) -> LoRABatch:
        """Make a batch with any possible content; its tiles say what it contains."""
        batch = LoRABatch([0], [size], [self._shape.max_rank], device, slot_affine=[affine])
        batch.provide(TilePlan, tiles)
        return batch


def most_tiles(size: int, slots: int, length: int = SHORT) -> int:
    """Return the largest number of tiles of ``length`` tokens for ``size`` tokens over ``slots`` adapters."""
    segments = min(size, slots)
    return segments + (size - segments) // length


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

    def __init__(self, fields: _Fields, block_size: int, queries: list[Tiles], *, padded: bool) -> None:
        self.spans, self.padded = (), padded
        self.block_size, self.device = block_size, fields.tables.device
        self.positions, self.cells, self.tables = fields.positions, fields.cells, fields.tables
        tiles: QueryTiles = _RecordedQueryTiles(self, queries)
        self.provide(QueryTiles, tiles)


class _RecordedQueryTiles(QueryTiles):
    def __init__(self, plan: AttentionPlan, all_tiles: list[Tiles]) -> None:
        super().__init__(plan)
        self._all = all_tiles

    def of(self, group: int, rows: int) -> list[Tiles]:
        return self._all


class _RecordedTiles(TilePlan):
    """Tiles by the tokens that they have at most."""

    def __init__(
        self, device: torch.device, by_length: dict[int, Tensor], affine: Tensor, longest: int
    ) -> None:
        super().__init__(LoRABatch([], [], [], device))
        self._by_length, self._affine = by_length, affine
        self.longest = longest

    def tiles(self, length: int) -> Tensor:
        return self._by_length[max(size for size in self._by_length if size <= length)]

    def affine_tiles(self, length: int) -> Tensor:
        assert length >= SHORT
        return self._affine
