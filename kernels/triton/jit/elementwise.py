"""The kernels that only move and scale: DoRA's gain and shift, and LoRA on embeddings."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.slices import A_RANK, AFFINE, COLUMNS, A, locate, pick, scales


@triton.jit(do_not_specialize=["place", "table_stride"])
def affine_kernel(
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
    y_stride,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile
    BLOCK_N: tl.constexpr,
):
    """``y += gain * y + shift`` for one tile and BLOCK_N columns of one slice. Grid: (blocks, tiles)."""
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    if tokens == 0:  # padding
        return
    j, column = locate(tl.program_id(0), width0, width1, width2, BLOCK_N)
    width = pick(j, width0, width1, width2)
    begin = tl.load(table_ptr + slot * table_stride + (place + j) * COLUMNS + AFFINE)
    if begin < 0:  # the module is neither scaled nor shifted
        return

    m = tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    gain_at = memory_ptr + begin * unit + n
    gain = tl.load(gain_at, mask=n < width, other=0.0).to(tl.float32)
    shift = tl.load(gain_at + width, mask=n < width, other=0.0).to(tl.float32)
    token = (first + m).to(tl.int64)
    y_at = y_ptr + token[:, None] * y_stride + pick(j, offset0, offset1, offset2) + n[None, :]
    mask = (m < tokens)[:, None] & (n < width)[None, :]
    y = tl.load(y_at, mask=mask, other=0.0)
    wide = y.to(tl.float32)
    tl.store(y_at, (wide + gain[None, :] * wide + shift[None, :]).to(y.dtype), mask=mask)


@triton.jit(do_not_specialize=["place", "table_stride"])
def embed_kernel(
    ids_ptr,  # [T]
    memory_ptr,  # [elements]
    scales_ptr,  # the same as float32, if it is INT8
    table_ptr,  # [S, places, COLUMNS], slots table_stride apart
    h_ptr,  # [T, 1, width], contiguous
    tiles_ptr,  # [tiles, 4] slot, first token, tokens, rank
    table_stride,
    place,
    unit,  # elements that offsets are counted in
    vocabulary,
    width,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile
    BLOCK_R: tl.constexpr,
    INT8: tl.constexpr,  # whether A is, with a scale for each row
):
    """Columns of A for one tile of tokens and BLOCK_R ranks. Grid: (rank blocks, tiles)."""
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    if tokens == 0:  # padding
        return
    row = table_ptr + slot * table_stride + place * COLUMNS
    rank = tl.load(row + A_RANK).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = (first + m).to(tl.int64)
    ids = tl.load(ids_ptr + token, mask=m < tokens, other=0)
    a_at = memory_ptr + tl.load(row + A) * unit + r[None, :] * vocabulary + ids[:, None]
    a = tl.load(a_at, mask=(m < tokens)[:, None] & (r < rank)[None, :], other=0.0)
    stored = (m < tokens)[:, None] & (r < width)[None, :]
    if INT8:
        a = a.to(tl.float32) * scales(scales_ptr, row, unit, r, r < rank)[None, :]
    tl.store(h_ptr + token[:, None] * width + r[None, :], a.to(h_ptr.dtype.element_ty), mask=stored)
