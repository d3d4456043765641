"""Paged attention as a Triton kernel; see :class:`Backend`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.backend import LayerCache, Scores
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.triton.jit.attention import attention_kernel
from aioengine.kernels.triton.launch import Limits, capability, launcher, limits, power_of_two
from aioengine.kernels.triton.query_tiles import FEW_ROWS, QueryTiles, Tiles, rows_of_prompts

_PROGRAMS = 256
"""Keys are split if there would be fewer programs than this: about two for each multiprocessor of a large
GPU."""
_MAX_SPLITS = 16
PART = 512
"""Keys in a part, which is computed separately and then joined with the earlier parts. The number is fixed,
because bits depend on it. A program computes one part or several."""


_FIVE_STAGES = 96 * 1024
"""Shared memory in which 16-bit heads of 128 have five stages."""


class AttentionConfig(NamedTuple):
    """Sizes that the work of a launch is cut into."""

    block_n: int
    """Keys at a time."""
    splits: int
    """Programs that share the parts of the keys, a power of two."""
    num_warps: int
    num_stages: int


def attention_config(
    tiles: Tiles, kv_heads: int, head_dim: int, bits: int, limits: Limits
) -> AttentionConfig:
    """Choose the configuration. Keys are split only for decoding, where otherwise most of a GPU would be
    idle."""
    splits = 1
    if tiles.block_m == FEW_ROWS:
        programs = len(tiles.table) * kv_heads
        wanted = min(_MAX_SPLITS, -(-_PROGRAMS // programs), -(-tiles.longest // PART))
        splits = power_of_two(wanted)
    return default_config(head_dim, bits, splits, tiles.block_m, limits)


def default_config(head_dim: int, bits: int, splits: int, rows: int, limits: Limits) -> AttentionConfig:
    """Choose as many keys at a time as registers allow: float32 products use no tensor cores, and need many
    registers, of large heads all that are left without a second stage. With five stages, two blocks of keys
    and values are under way at a time, behind the reads of the block table; with three, one block. (Larger
    heads would leave no room for a second program.)"""
    block_d = power_of_two(head_dim)
    block_n = max(16, min(64, (8192 if bits == 16 else 2048) // block_d))
    many = 256 // limits.warp_size
    if bits > 16:
        return AttentionConfig(block_n, splits, 4 if block_d <= 64 else many, 2 if block_d <= 128 else 1)
    stages = 5 if limits.shared_bytes >= _FIVE_STAGES else 3
    return AttentionConfig(block_n, splits, many if rows >= 64 else 4, stages if block_d <= 128 else 2)


def paged_attention(qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Attend to what is stored; see :class:`Backend`."""
    keys = cache.keys
    window, scale, soft_cap, sinks = scores
    kind = (qkv.shape, qkv.stride(0), qkv.dtype, keys.shape, keys.stride(0), window, scale, soft_cap)
    made, key = plan.derive(_launches), (*kind, sinks is None)
    launches = made.get(key)
    if launches is None:
        launches = made[key] = _prepare(qkv, cache, plan, scores)
    kv_heads, d = keys.shape[2:]
    make = qkv.new_zeros if plan.padded else qkv.new_empty
    out = make(qkv.shape[0], (qkv.shape[1] - 2 * kv_heads) * d)
    for launch in launches:
        launch(qkv, cache, sinks, out)
    return out


def _launches(plan: AttentionPlan) -> dict[tuple[object, ...], list[_Attention]]:
    """Return what is prepared for a step: nothing yet."""
    return {}


def _prepare(qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> list[_Attention]:
    kv_heads, d = cache.keys.shape[2:]
    bits = 8 * qkv.element_size()
    every = plan.derive(QueryTiles).of(
        qkv.shape[1] // kv_heads - 2, rows_of_prompts(bits, d, capability(qkv.device))
    )
    configs = [attention_config(tiles, kv_heads, d, bits, limits(qkv.device)) for tiles in every]
    return [
        _Attention(qkv, cache, plan, scores, tiles, config)
        for tiles, config in zip(every, configs, strict=True)
    ]


class _Attention:
    """A launch over tiles of one step, for all layers that are alike: they differ in addresses alone."""

    def __init__(
        self,
        qkv: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        scores: Scores,
        tiles: Tiles,
        config: AttentionConfig,
    ) -> None:
        keys = cache.keys
        window, scale, soft_cap, sinks = scores
        _, block_size, kv_heads, d = keys.shape
        block_n, splits, num_warps, num_stages = config
        block_d = max(16, power_of_two(d))
        most_parts, count = -(-tiles.longest // PART), tiles.table.shape[0]
        rows = count * kv_heads * most_parts * tiles.block_m if splits > 1 else 0
        self._grid = count, kv_heads, splits
        self._tables = plan.tables, tiles.table
        self._partials, self._stats = rows * block_d, rows * 2
        """Elements of the results of parts, and of what is known of their scores."""
        self._nothing = qkv.new_empty(0, dtype=torch.float32)
        self._arrivals = plan.derive(QueryTiles).arrivals(count * kv_heads)
        self._numbers = (
            *(keys.stride(0), most_parts, qkv.stride(0), plan.tables.stride(0), window or 0),
            (d**-0.5 if scale is None else scale) * math.log2(math.e),
            (soft_cap or 0.0) * math.log2(math.e),
        )
        self._launch = launcher(
            attention_kernel,
            GROUP=qkv.shape[1] // kv_heads - 2,
            D=d,
            BLOCK_SIZE=block_size,
            SPLITS=splits,
            BLOCK_M=tiles.block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            PART=PART,
            WINDOWED=window is not None,
            STAGES=num_stages,
            CAPPED=soft_cap is not None,
            SINKS=sinks is not None,
            num_warps=num_warps,
            num_stages=num_stages,
        )

    def __call__(self, qkv: Tensor, cache: LayerCache, sinks: Tensor | None, out: Tensor) -> None:
        partials = stats = self._nothing
        if self._partials:
            partials = out.new_empty(self._partials + self._stats, dtype=torch.float32)
            stats = partials[self._partials :]
        tensors = (*(qkv, *cache, *self._tables, out, partials, stats), qkv if sinks is None else sinks)
        self._launch(self._grid, (*tensors, self._arrivals), self._numbers)
