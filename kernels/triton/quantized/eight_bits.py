"""Products with eight-bit weights in eight bits, as two Triton launches: activations are rounded, too.

Each row has a scale (each group of a row, where the weight has groups), as in LLM.int8() (Dettmers et al.,
2022, arXiv:2208.07339) and DeepSeek-V3's products in blocks (2024, arXiv:2412.19437). Tensor cores compute
twice as many products of eight bits as of sixteen, which helps many rows; few rows wait for the weight.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.triton.jit.eight_bits import eight_bits_kernel, round_rows_kernel
from aioengine.kernels.triton.launch import Launcher, capability

_CAPABILITY = {"int8": 80, "fp8": 89}
"""The compute capability from which on tensor cores take a format: A100, and L4 and H100."""
ROW_BLOCK = 1024
"""Inputs of a row that are rounded at a time."""
BLOCK_M, BLOCK_N, BLOCK_K = 64, 128, 128
WARPS, STAGES = 8, 3


class Rows(NamedTuple):
    """Activations in eight bits."""

    codes: Tensor
    """[T, k] uint8"""
    scales: Tensor
    """[T, groups] float32"""
    group: int


def covers(weight: BlockWeight, device: torch.device) -> bool:
    """Whether products with this weight may be computed in eight bits, and can be."""
    if not weight.rounds or weight.format not in _CAPABILITY or weight.k % 16:
        return False
    symmetric = weight.zero is None and weight.group_of is None and weight.middle == 0
    whole = weight.group >= weight.k or weight.group % BLOCK_K == 0
    return symmetric and whole and capability(device) >= _CAPABILITY[weight.format]


def round_rows(x: Tensor, format: str, group: int) -> Rows:
    """Return ``x`` [T, k] in eight bits, ``group`` neighbouring inputs with a scale; at least k: all."""
    tokens, k = x.shape
    group = min(group, k)
    groups = -(-k // group)
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(tokens, k, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    _rounding(format, ROW_BLOCK if groups == 1 else BLOCK_K)(
        (tokens, groups, 1), (x, codes, scales), (k, x.stride(0), groups, group)
    )
    return Rows(codes, scales, group)


def multiply(rows: Rows, weight: BlockWeight, bias: Tensor | None, y: Tensor) -> None:
    """Write ``x W^T + bias`` to ``y`` [T, n], whose columns adjoin, for ``x`` in eight bits with the weight's
    groups."""
    assert weight.scale is not None and rows.scales.shape[1] == weight.scale.shape[1]
    tokens = len(rows.codes)
    _products(weight.format, weight.scale.shape[1] == 1, bias is not None)(
        (-(-tokens // BLOCK_M), -(-weight.n // BLOCK_N), 1),
        (rows.codes, rows.scales, weight.data, weight.scale, y if bias is None else bias, y),
        (tokens, weight.n, weight.k, y.stride(0), rows.group, weight.scale.shape[1]),
    )


@functools.cache
def _rounding(format: str, block: int) -> Launcher:
    return Launcher(round_rows_kernel, FLOAT8=format == "fp8", BLOCK=block, num_warps=4)


@functools.cache
def _products(format: str, whole: bool, bias: bool) -> Launcher:
    return Launcher(
        eight_bits_kernel,
        FLOAT8=format == "fp8",
        WHOLE=whole,
        BIAS=bias,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
        num_stages=STAGES,
    )
