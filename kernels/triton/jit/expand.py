"""The expand kernel: ``y[t, offsets[j]:] += B[j][slot(t)] h[t, j]`` over tiles of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.product import add_product
from aioengine.kernels.triton.jit.slices import locate, pick


@triton.jit
def expand_kernel(
    h_ptr,  # [T, n, R], contiguous
    y_ptr,  # [T, ...], rows y_stride apart
    tiles_ptr,  # [tiles, 4] slot, first token, tokens, rank
    b0_ptr,  # three times [S, width, R], slots slot_stride apart; those that are not there have width 0
    b1_ptr,
    b2_ptr,
    slot_stride0,
    slot_stride1,
    slot_stride2,
    width0,
    width1,
    width2,
    offset0,
    offset1,
    offset2,
    h_stride,
    y_stride,
    max_rank,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program: one tile of tokens and BLOCK_N columns of one slice. Grid: (column blocks, tiles)."""
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    rank = tl.load(tiles_ptr + 4 * tile + 3)
    if tokens == 0:  # padding
        return
    j, column = locate(tl.program_id(0), width0, width1, width2, BLOCK_N)
    b_ptr = pick(j, b0_ptr, b1_ptr, b2_ptr)
    width = pick(j, width0, width1, width2)
    slot_stride = pick(j, slot_stride0, slot_stride1, slot_stride2)

    m = tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    token = (first + m).to(tl.int64)
    h_at = h_ptr + token[:, None] * h_stride + j * max_rank + r[None, :]
    b_at = b_ptr + slot * slot_stride + n[:, None] * max_rank + r[None, :]
    y_at = y_ptr + token[:, None] * y_stride + pick(j, offset0, offset1, offset2) + n[None, :]
    mask = (m < tokens)[:, None] & (n < width)[None, :]
    y = tl.load(y_at, mask=mask, other=0.0)  # on its way while the product is computed

    # From rank on there are zeros. A limit at rank itself, which may be any number, ruled out wide loads.
    limit = tl.minimum(tl.cdiv(rank, 16) * 16, max_rank)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, limit, BLOCK_R):
        inside = (r < limit - start)[None, :]
        h = tl.load(h_at + start, mask=inside & (m < tokens)[:, None], other=0.0)
        b = tl.load(b_at + start, mask=inside & (n < width)[:, None], other=0.0)
        acc = add_product(acc, h, b)

    tl.store(y_at, (y.to(tl.float32) + acc).to(y.dtype), mask=mask)
