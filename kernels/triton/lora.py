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
from aioengine.kernels.triton.launch import on
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
    longest = batch.derive(TilePlan).longest
    return shrink(x, pool, batch, shrink_config(_bits(x), pool.slots.max_rank, pool.in_features, longest))


def lora_expand(h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch) -> None:
    """``y[t, b_offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`Backend`."""
    longest = batch.derive(TilePlan).longest
    expand(h, pool, y, batch, expand_config(_bits(h), pool.slots.max_rank, sum(pool.widths), longest))


def shrink(x: Tensor, pool: LoRAPool, batch: LoRABatch, config: ShrinkConfig) -> Tensor:
    """:func:`lora_shrink` with a configuration of the caller's choice."""
    n_slices, width = len(pool.modules), batch.width
    if not batch.segments:
        return x.new_zeros(len(x), n_slices, width)
    h = x.new_empty(x.shape[0], n_slices, width)
    _clear_others(h, batch)
    plan, slots = batch.derive(TilePlan), pool.slots
    tiles = plan.tiles(config.block_m)
    columns, count = n_slices * -(-width // config.block_r), tiles.shape[0]
    split = config.split_k > 1 and columns * count < _PROGRAMS
    programs, outputs = (config.split_k, columns * count) if split else (1, 0)
    x = _adjoining(x)
    with on(x.device):
        shrink_kernel[columns * programs, count](
            *(x, slots.memory, slots.floats(torch.float32), slots.device_table, h, tiles),
            x.new_empty(outputs * programs * config.block_m * config.block_r, dtype=torch.float32),
            plan.arrivals(outputs),
            *(x.stride(0), slots.device_table.stride(0), pool.first, slots.unit),
            *(pool.in_features, n_slices, width),
            BLOCK_M=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_K=config.block_k,
            PARTS=config.split_k,
            SPLIT=split,
            INT8=slots.int8,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return _weighted(h, batch)


def expand(h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch, config: ExpandConfig) -> None:
    """:func:`lora_expand` with a configuration of the caller's choice."""
    if not batch.segments:
        return
    assert y.stride(1) == 1, "columns of y must adjoin"
    tiles, slots = batch.derive(TilePlan).tiles(config.block_m), pool.slots
    h, count = _adjoining(h), tiles.shape[0]
    for first, slices in _launches(pool.widths, pool.b_offsets):
        with on(y.device):
            expand_kernel[slices.blocks(config.block_n), count](
                *(h[:, first:] if first else h, y, tiles, slots.memory, slots.device_table),
                *(slots.device_table.stride(0), pool.first + first, slots.unit),
                *(*slices.widths, *slices.offsets, h.stride(0), y.stride(0), h.shape[2]),
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_R=config.block_r,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )


def lora_affine(y: Tensor, pool: LoRAPool, batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`Backend`."""
    if not batch.affine:
        return
    assert y.stride(1) == 1, "columns of y must adjoin"
    tiles, slots = batch.derive(TilePlan).affine_tiles(SHORT), pool.slots
    unit = slots.unit // slots.dtype.itemsize if slots.int8 else slots.unit
    for first, slices in _launches(pool.affine_widths, pool.offsets):
        with on(y.device):
            affine_kernel[slices.blocks(AFFINE_COLUMNS), len(tiles)](
                *(y, tiles, slots.floats(slots.dtype), slots.device_table),
                *(slots.device_table.stride(0), pool.first + first, unit),
                *(*slices.widths, *slices.offsets, y.stride(0)),
                BLOCK_M=SHORT,
                BLOCK_N=AFFINE_COLUMNS,
            )


def lora_embed(token_ids: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, 0] = A[slot(t)][:, token_ids[t]]``; see :class:`Backend`."""
    slots, width = pool.slots, batch.width
    if not batch.segments:
        return slots.memory.new_zeros(len(token_ids), 1, width, dtype=slots.dtype)
    h = slots.memory.new_empty(len(token_ids), 1, width, dtype=slots.dtype)
    _clear_others(h, batch)
    tiles = batch.derive(TilePlan).tiles(SHORT)
    with on(h.device):
        embed_kernel[-(-width // EMBED_RANKS), len(tiles)](
            *(
                token_ids.contiguous(),
                slots.memory,
                slots.floats(torch.float32),
                slots.device_table,
                h,
                tiles,
            ),
            *(slots.device_table.stride(0), pool.first, slots.unit, pool.in_features, width),
            BLOCK_M=SHORT,
            BLOCK_R=EMBED_RANKS,
            INT8=slots.int8,
        )
    return _weighted(h, batch)


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


def _clear_others(h: Tensor, batch: LoRABatch) -> None:
    """Set the rows of no segment to zero: normally those before the first, as base rows come first."""
    end = 0
    for _, start, stop, *_ in batch.segments:
        if start > end:
            h[end:start] = 0
        end = stop
    if end < h.shape[0]:
        h[end:] = 0


def _weighted(h: Tensor, batch: LoRABatch) -> Tensor:
    """Multiplies A's outputs by the weights of mixes, in place."""
    return h.mul_(batch.derive(row_weights)) if batch.is_weighted else h


def _adjoining(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if the elements of a row are not adjacent."""
    if tensor.is_contiguous():
        return tensor
    inner = 1
    for size, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1], strict=True):
        if size != 1 and stride != inner:
            return tensor.contiguous()
        inner *= size
    return tensor


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.element_size()
