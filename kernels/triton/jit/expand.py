"""The expand kernel: ``y[t, offsets[j]:] += B[j][slot(t)] h[t, j]`` over tiles of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.product import add_product
from aioengine.kernels.triton.jit.slices import B_RANK, COLUMNS, B, locate, pick


@triton.jit
def _product(acc, h_at, b_at, h_mask, b_mask, rank, BLOCK_R: tl.constexpr):
    """``acc + h B^T`` over ``rank`` columns, of which the compiler may know what divides their number."""
    r = tl.arange(0, BLOCK_R)[None, :]
    for start in range(0, rank, BLOCK_R):
        inside = r < rank - start
        h = tl.load(h_at + r + start, mask=inside & h_mask, other=0.0)
        b = tl.load(b_at + r + start, mask=inside & b_mask, other=0.0)
        acc = add_product(acc, h, b)
    return acc


@triton.jit(do_not_specialize=["place", "table_stride"])
def expand_kernel(
    h_ptr,  # [T, n, width], rows h_stride apart
    y_ptr,  # [T, ...], rows y_stride apart
    tiles_ptr,  # [tiles, 4] slot, first token, tokens, rank
    memory_ptr,  # [elements]
    table_ptr,  # [S, places, COLUMNS], slots table_stride apart
    table_stride,
    place,  # of the first slice
    unit,  # elements that offsets are counted in
    width0,  # of three slices; those that are not there have width 0
    width1,
    width2,
    offset0,
    offset1,
    offset2,
    h_stride,
    y_stride,
    width,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program: one tile of tokens and BLOCK_N columns of one slice. Grid: (column blocks, tiles)."""
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    if tokens == 0:  # padding
        return
    j, column = locate(tl.program_id(0), width0, width1, width2, BLOCK_N)
    outputs = pick(j, width0, width1, width2)
    row = table_ptr + slot * table_stride + (place + j) * COLUMNS
    rank = tl.load(row + B_RANK).to(tl.int32)
    if rank == 0:  # the adapter does not target the module
        return

    m = tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    token = (first + m).to(tl.int64)
    y_at = y_ptr + token[:, None] * y_stride + pick(j, offset0, offset1, offset2) + n[None, :]
    mask = (m < tokens)[:, None] & (n < outputs)[None, :]
    y = tl.load(y_at, mask=mask, other=0.0)  # on its way while the product is computed

    h_at = h_ptr + token[:, None] * h_stride + j * width
    b_ptr = memory_ptr + tl.load(row + B) * unit
    h_mask, b_mask = (m < tokens)[:, None], (n < outputs)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    VECTOR: tl.constexpr = 128 // memory_ptr.dtype.element_ty.primitive_bitwidth
    WORD: tl.constexpr = VECTOR // 4
    if rank % VECTOR == 0:  # rows of whole vectors, which are loaded as such
        whole = tl.multiple_of(rank // VECTOR * VECTOR, VECTOR)
        acc = _product(acc, h_at, b_ptr + n[:, None] * whole, h_mask, b_mask, whole, BLOCK_R)
    elif rank % WORD == 0:  # the least that is copied without waiting
        whole = tl.multiple_of(rank // WORD * WORD, WORD)
        acc = _product(acc, h_at, b_ptr + n[:, None] * whole, h_mask, b_mask, whole, BLOCK_R)
    else:
        acc = _product(acc, h_at, b_ptr + n[:, None] * rank, h_mask, b_mask, rank, BLOCK_R)

    tl.store(y_at, (y.to(tl.float32) + acc).to(y.dtype), mask=mask)
