"""The slice of a fused linear, and its columns, that a program of a kernel works on."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.slots import Column

A = tl.constexpr(Column.A.value)
A_RANK = tl.constexpr(Column.A_RANK.value)
B = tl.constexpr(Column.B.value)
B_RANK = tl.constexpr(Column.B_RANK.value)
AFFINE = tl.constexpr(Column.AFFINE.value)
SCALE = tl.constexpr(Column.SCALE.value)
COLUMNS = tl.constexpr(len(Column))

MAX_SLICES = 3
"""Slices that one launch takes (q, k and v); more are given to several launches."""


@triton.jit
def scales(scales_ptr, row, unit, r, mask):
    """The scales of rows ``r`` of A, whose memory is int8; ``row`` is the place's in the table, whose offsets
    are counted in ``unit`` bytes."""
    return tl.load(scales_ptr + tl.load(row + SCALE) * (unit // 4) + r, mask=mask, other=0.0)


@triton.jit
def pick(j, value0, value1, value2):
    """The value of slice ``j``."""
    return tl.where(j == 0, value0, tl.where(j == 1, value1, value2))


@triton.jit
def locate(block, width0, width1, width2, BLOCK_N: tl.constexpr):
    """Slice and first column of block number ``block`` of the slices' columns, cut BLOCK_N wide.

    The slices may be of any width, so the grid has exactly as many blocks as there is work. Slices that
    are not there have width 0.
    """
    blocks0 = tl.cdiv(width0, BLOCK_N)
    blocks1 = tl.cdiv(width1, BLOCK_N)
    j = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    return j, (block - pick(j, 0, blocks0, blocks0 + blocks1)) * BLOCK_N
