"""The kernels that only move and scale: DoRA's gain and shift, and LoRA on embeddings."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.slices import locate, pick


@triton.jit
def affine_kernel(
    y_ptr,  # [T, ...], rows y_stride apart
    tiles_ptr,  # [tiles, 4] slot, first token, tokens, rank
    affine0_ptr,  # three times [S, 2, width], slots slot_stride apart; if not there, width is 0
    affine1_ptr,
    affine2_ptr,
    slot_stride0,
    slot_stride1,
    slot_stride2,
    width0,
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
    slot_stride = pick(j, slot_stride0, slot_stride1, slot_stride2)

    m = tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    gain_at = pick(j, affine0_ptr, affine1_ptr, affine2_ptr) + slot * slot_stride + n
    gain = tl.load(gain_at, mask=n < width, other=0.0).to(tl.float32)
    shift = tl.load(gain_at + width, mask=n < width, other=0.0).to(tl.float32)
    token = (first + m).to(tl.int64)
    y_at = y_ptr + token[:, None] * y_stride + pick(j, offset0, offset1, offset2) + n[None, :]
    mask = (m < tokens)[:, None] & (n < width)[None, :]
    y = tl.load(y_at, mask=mask, other=0.0)
    wide = y.to(tl.float32)
    tl.store(y_at, (wide + gain[None, :] * wide + shift[None, :]).to(y.dtype), mask=mask)


@triton.jit
def embed_kernel(
    ids_ptr,  # [T]
    a_ptr,  # [S, R, vocabulary], slots slot_stride apart
    h_ptr,  # [T, 1, R], contiguous
    tiles_ptr,  # [tiles, 4] slot, first token, tokens, rank
    slot_stride,
    vocabulary,
    max_rank,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile
    BLOCK_R: tl.constexpr,
):
    """Columns of A for one tile of tokens and BLOCK_R ranks. Grid: (rank blocks, tiles)."""
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    rank = tl.load(tiles_ptr + 4 * tile + 3)
    if tokens == 0:  # padding
        return
    m = tl.arange(0, BLOCK_M)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = (first + m).to(tl.int64)
    ids = tl.load(ids_ptr + token, mask=m < tokens, other=0)
    a_at = a_ptr + slot * slot_stride + r[None, :] * vocabulary + ids[:, None]
    a = tl.load(a_at, mask=(m < tokens)[:, None] & (r < rank)[None, :], other=0.0)
    stored = (m < tokens)[:, None] & (r < max_rank)[None, :]
    tl.store(h_ptr + token[:, None] * max_rank + r[None, :], a, mask=stored)
