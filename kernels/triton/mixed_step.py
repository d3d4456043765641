"""The metadata of mixed steps, parts of prompts beside decodes, at fixed addresses, as :mod:`.fixed_step` has
it for decodes alone.
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
from aioengine.kernels.triton.fixed_step import KnownTables, most_tiles, write
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


class MixedShape(NamedTuple):
    """Sizes that a mixed step's tables depend on."""

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


class MixedStep:
    """Steps of up to ``size`` tokens of up to ``shape.sequences`` sequences; rows beyond them are padding.

    A padding row changes no other row: it is token 0, stores nothing, and is in no tile.
    """

    def __init__(self, size: int, shape: MixedShape, device: torch.device | str) -> None:
        device = torch.device(device)
        self.size, self._shape = size, shape
        self._few = max(FEW_ROWS, power_of_two(shape.group))
        self._many = max(shape.query_rows, power_of_two(shape.group))
        long = -(-size // (self._many // shape.group)) + SPARE_TILES
        tiles = most_tiles(size, shape.slots, shape.lora_tokens)
        short, sampled = most_tiles(size, shape.slots), most_tiles(shape.sequences, shape.slots)
        heights = (shape.sequences, long, tiles, short, short, sampled, sampled)
        fields: list[tuple[tuple[int, ...], torch.dtype]] = [((size,), torch.int64)] * 3
        fields += [((shape.sequences,), torch.int64)]
        fields += [((shape.sequences, shape.table_width), torch.int32)]
        fields += [((height, 4), torch.int32) for height in heights]
        self._buffer = HostBuffer(fields, device)
        self._host, there = _Fields(*self._buffer.host), _Fields(*self._buffer.device)
        for tensor in self._host:
            tensor.zero_()
        self._tables = KnownTables(self._host.tables)
        self.token_ids, self.rows = there.token_ids, there.rows
        self.attention: AttentionPlan = _MixedAttention(there, shape, self._few, self._many)
        self.base = LoRABatch([], [], [], device)
        """Plan of steps without adapters, and of their sampled rows."""
        plan = _MixedTiles(
            device, {shape.lora_tokens: there.tiles, SHORT: there.short_tiles}, there.affine_tiles
        )
        plan.longest = SHORT + 1  # as long as prompts are
        ends = _MixedTiles(device, {SHORT: there.sampled}, there.affine_sampled)
        ends.longest = SHORT
        self.lora = self._batch(size, plan, device, affine=False)
        self.affine = self._batch(size, plan, device, affine=True)
        self.sample_lora = self._batch(shape.sequences, ends, device, affine=False)
        self.sample_affine = self._batch(shape.sequences, ends, device, affine=True)

    @property
    def table_width(self) -> int:
        return self._shape.table_width

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self._buffer.nbytes

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
        long = [(i, span) for i, span in enumerate(spans) if span.length > limit]
        many = cut_queries(long, self._many, shape.group)
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
        write(host.token_ids, token_ids)
        write(host.positions, positions)
        write(host.cells, cells, padding=-1)
        write(host.rows, rows)
        self._tables.write(tables)
        _write_tiles(host.few, cut_queries(short, self._few, shape.group))
        _write_tiles(host.many, many)
        write(host.tiles, cut(lora.segments, shape.lora_tokens))
        write(host.short_tiles, cut(lora.segments, SHORT))
        write(host.affine_tiles, cut(lora.affine, SHORT))
        write(host.sampled, cut(sample_lora.segments, SHORT))
        write(host.affine_sampled, cut(sample_lora.affine, SHORT))
        self._buffer.send()
        return True

    def _batch(self, size: int, tiles: TilePlan, device: torch.device, *, affine: bool) -> LoRABatch:
        """Make a batch with any possible content; its tiles say what it contains."""
        batch = LoRABatch([0], [size], [self._shape.max_rank], device, slot_affine=[affine])
        batch.provide(TilePlan, tiles)
        return batch


def _write_tiles(target: Tensor, tiles: Sequence[tuple[int, int, int, int]]) -> None:
    write(target, [*tiles, *[_NOTHING] * (len(target) - len(tiles))])


class _MixedAttention(AttentionPlan):
    """A plan without spans on the host."""

    def __init__(self, fields: _Fields, shape: MixedShape, few: int, many: int) -> None:
        Derivable.__init__(self)
        self.spans, self.padded = (), True
        self.block_size, self.device = shape.block_size, fields.tables.device
        self.positions, self.cells, self.tables = fields.positions, fields.cells, fields.tables
        longest = shape.table_width * shape.block_size
        made = [Tiles(fields.few, few, longest), Tiles(fields.many, many, longest)]
        queries: QueryTiles = _MixedQueryTiles(self, made)
        self.provide(QueryTiles, queries)


class _MixedQueryTiles(QueryTiles):
    def __init__(self, plan: AttentionPlan, made: list[Tiles]) -> None:
        super().__init__(plan)
        self._all = made

    def of(self, group: int, rows: int) -> list[Tiles]:
        return self._all


class _MixedTiles(TilePlan):
    """Tiles by the tokens that they have at most."""

    def __init__(self, device: torch.device, tiles: dict[int, Tensor], affine: Tensor) -> None:
        super().__init__(LoRABatch([], [], [], device))
        self._by_length, self._affine = tiles, affine

    def tiles(self, length: int) -> Tensor:
        return self._by_length[max(size for size in self._by_length if size <= length)]

    def affine_tiles(self, length: int) -> Tensor:
        assert length >= SHORT
        return self._affine
