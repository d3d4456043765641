"""The LoRA operations as Triton kernels; see :class:`Backend`.

The grids run over tiles of the step's segments, which the host cuts (:mod:`.plan`). So no program is started
for a slot without tokens, and nothing waits for the device. Grouping tokens by adapter follows Punica (Chen
et al., 2023, https://arxiv.org/abs/2310.18547) and S-LoRA (Sheng et al., 2023,
https://arxiv.org/abs/2311.03285).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.lora import LoRABatch, row_weights
from aioengine.kernels.slots import LoRAPool
from aioengine.kernels.triton.jit.elementwise import affine_kernel, embed_kernel
from aioengine.kernels.triton.jit.expand import expand_kernel
from aioengine.kernels.triton.jit.shrink import shrink_kernel
from aioengine.kernels.triton.jit.slices import MAX_SLICES
from aioengine.kernels.triton.launch import launcher
from aioengine.kernels.triton.plan import TilePlan
from aioengine.kernels.triton.table import (
    AFFINE_COLUMNS,
    EMBED_RANKS,
    SHORT,
    ExpandConfig,
    ShrinkConfig,
    expand_config,
    shrink_config,
)

_PROGRAMS = 128
"""If a shrink would have fewer programs than this, each part of the inputs gets a separate program. It is
about the number of multiprocessors of a large GPU. Bits do not depend on it."""


def lora_shrink(x: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`Backend`."""
    if not batch.segments:
        return x.new_zeros(len(x), len(pool.modules), batch.width)
    x, made = x.contiguous(), batch.derive(_shrinks)
    key = id(pool.slots), pool.in_features, len(pool.modules), x.shape, x.stride(0), x.dtype
    found = made.get(key)
    if found is None:
        longest = batch.derive(TilePlan).longest
        config = shrink_config(_bits(x), pool.slots.max_rank, pool.in_features, longest)
        found = made[key] = _Shrink(x, pool, batch, config)
    h = found(x, pool.first)
    return h.mul_(batch.derive(row_weights)) if batch.is_weighted else h


def lora_expand(h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch) -> None:
    """``y[t, b_offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`Backend`."""
    if not batch.segments:
        return
    h, made = h.contiguous(), batch.derive(_expands)
    key = id(pool.slots), pool.widths, pool.b_offsets, h.stride(), h.dtype, y.stride()
    found = made.get(key)
    if found is None:
        longest = batch.derive(TilePlan).longest
        config = expand_config(_bits(h), pool.slots.max_rank, sum(pool.widths), longest)
        found = made[key] = _Expand(h, pool, y, batch, config)
    found(h, y, pool.first)


def shrink(x: Tensor, pool: LoRAPool, batch: LoRABatch, config: ShrinkConfig) -> Tensor:
    """:func:`lora_shrink` with a configuration of the caller's choice, of a batch with adapters."""
    x = x.contiguous()
    return _Shrink(x, pool, batch, config)(x, pool.first)


def expand(h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch, config: ExpandConfig) -> None:
    """:func:`lora_expand` with a configuration of the caller's choice."""
    h = h.contiguous()
    _Expand(h, pool, y, batch, config)(h, y, pool.first)


def _shrinks(batch: LoRABatch) -> dict[tuple[object, ...], _Shrink]:
    """Return what is prepared for a step: nothing yet."""
    return {}


def _expands(batch: LoRABatch) -> dict[tuple[object, ...], _Expand]:
    return {}


class _Shrink:
    """A shrink of one step for all pools that are alike: they differ in their places alone."""

    def __init__(self, x: Tensor, pool: LoRAPool, batch: LoRABatch, config: ShrinkConfig) -> None:
        plan, slots, n_slices, width = batch.derive(TilePlan), pool.slots, len(pool.modules), batch.width
        tiles = plan.tiles(config.block_m)
        columns, count = n_slices * -(-width // config.block_r), tiles.shape[0]
        split = config.split_k > 1 and columns * count < _PROGRAMS
        programs, outputs = (config.split_k, columns * count) if split else (1, 0)
        self._slots = slots  # it must live for as long as its id is a key
        self._grid = columns * programs, count, 1
        self._outputs = len(x), n_slices, width
        self._others = _others(batch, len(x))
        self._partials = outputs * programs * config.block_m * config.block_r
        self._nothing = x.new_empty(0, dtype=torch.float32)
        self._before = slots.memory, slots.floats(torch.float32), slots.device_table
        self._tiles, self._arrivals = tiles, plan.arrivals(outputs)
        self._strides = x.stride(0), slots.device_table.stride(0)
        self._sizes = slots.unit, pool.in_features, n_slices, width
        self._launch = launcher(
            shrink_kernel,
            BLOCK_M=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_K=config.block_k,
            PARTS=config.split_k,
            SPLIT=split,
            INT8=slots.int8,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def __call__(self, x: Tensor, place: int) -> Tensor:
        h, partials = x.new_empty(self._outputs), self._nothing
        for begin, end in self._others:
            h[begin:end] = 0
        if self._partials:
            partials = x.new_empty(self._partials, dtype=torch.float32)
        tensors = (x, *self._before, h, self._tiles, partials, self._arrivals)
        self._launch(self._grid, tensors, (*self._strides, place, *self._sizes))
        return h


class _Expand:
    """An expand of one step for all pools that are alike: they differ in their places alone."""

    def __init__(self, h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch, config: ExpandConfig) -> None:
        assert y.stride(1) == 1, "columns of y must adjoin"
        tiles, slots = batch.derive(TilePlan).tiles(config.block_m), pool.slots
        self._slots, self._after = slots, (tiles, slots.memory, slots.device_table)
        self._stride, strides = slots.device_table.stride(0), (h.stride(0), y.stride(0), h.shape[2])
        self._launches = [
            (
                first,
                (slices.blocks(config.block_n), tiles.shape[0], 1),
                (slots.unit, *slices.widths, *slices.offsets, *strides),
            )
            for first, slices in _launches(pool.widths, pool.b_offsets)
        ]
        self._launch = launcher(
            expand_kernel,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def __call__(self, h: Tensor, y: Tensor, place: int) -> None:
        for first, grid, sizes in self._launches:
            tensors = (h[:, first:] if first else h, y, *self._after)
            self._launch(grid, tensors, (self._stride, place + first, *sizes))


def lora_affine(y: Tensor, pool: LoRAPool, batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`Backend`."""
    if not batch.affine:
        return
    assert y.stride(1) == 1, "columns of y must adjoin"
    tiles, slots = batch.derive(TilePlan).affine_tiles(SHORT), pool.slots
    unit = slots.unit // slots.dtype.itemsize if slots.int8 else slots.unit
    launch = launcher(affine_kernel, BLOCK_M=SHORT, BLOCK_N=AFFINE_COLUMNS)
    for first, slices in _launches(pool.affine_widths, pool.offsets):
        launch(
            (slices.blocks(AFFINE_COLUMNS), len(tiles), 1),
            (y, tiles, slots.floats(slots.dtype), slots.device_table),
            (
                *(slots.device_table.stride(0), pool.first + first, unit),
                *(*slices.widths, *slices.offsets, y.stride(0)),
            ),
        )


def lora_embed(token_ids: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, 0] = A[slot(t)][:, token_ids[t]]``; see :class:`Backend`."""
    slots, width = pool.slots, batch.width
    if not batch.segments:
        return slots.memory.new_zeros(len(token_ids), 1, width, dtype=slots.dtype)
    h = slots.memory.new_empty(len(token_ids), 1, width, dtype=slots.dtype)
    for begin, end in _others(batch, len(h)):
        h[begin:end] = 0
    tiles = batch.derive(TilePlan).tiles(SHORT)
    memory = slots.memory, slots.floats(torch.float32), slots.device_table
    launcher(embed_kernel, BLOCK_M=SHORT, BLOCK_R=EMBED_RANKS, INT8=slots.int8)(
        (-(-width // EMBED_RANKS), len(tiles), 1),
        (token_ids.contiguous(), *memory, h, tiles),
        (slots.device_table.stride(0), pool.first, slots.unit, pool.in_features, width),
    )
    return h.mul_(batch.derive(row_weights)) if batch.is_weighted else h


class _Slices(NamedTuple):
    """Slices as they are passed to a launch: always MAX_SLICES, the unused ones with width 0."""

    widths: list[int]
    offsets: list[int]

    def blocks(self, block_n: int) -> int:
        return sum(-(-width // block_n) for width in self.widths)


@functools.cache  # called in every layer of every step
def _launches(widths: tuple[int, ...], offsets: tuple[int, ...]) -> list[tuple[int, _Slices]]:
    """Group the slices into as few launches as possible, each with the number of its first slice."""
    found = []
    for first in range(0, len(widths), MAX_SLICES):
        chosen = slice(first, first + MAX_SLICES)
        missing = [0] * (MAX_SLICES - len(widths[chosen]))
        found.append((first, _Slices([*widths[chosen], *missing], [*offsets[chosen], *missing])))
    return found


def _others(batch: LoRABatch, rows: int) -> list[tuple[int, int]]:
    """Return the rows of no segment, which become zero: normally those before the first, as base rows come
    first."""
    stops = [0, *(segment.stop for segment in batch.segments)]
    starts = [*(segment.start for segment in batch.segments), rows]
    return [(begin, end) for begin, end in zip(stops, starts, strict=True) if begin < end]


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.element_size()
