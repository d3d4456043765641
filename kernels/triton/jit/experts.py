"""The experts' linears: ``y[s] = W[expert(s)] x[s] + bias[expert(s)]`` over tiles of rows of one expert."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.product import add_product


@triton.jit
def expert_kernel(
    x_ptr,  # [S, in], contiguous
    weight_ptr,  # [experts * out, in], contiguous
    bias_ptr,  # [experts * out], not read unless BIAS
    y_ptr,  # [S, out], contiguous
    tiles_ptr,  # [tiles, 3] expert, first row, rows
    n_in,
    n_out,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least the rows of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: one tile of rows and BLOCK_N outputs. Grid: (output blocks, tiles)."""
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    rows = tl.load(tiles_ptr + 3 * tile + 2)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = (first + m).to(tl.int64)
    x_at = x_ptr + row[:, None] * n_in + k[None, :]
    w_at = weight_ptr + (expert * n_out + n)[:, None] * n_in + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_in, BLOCK_K):
        inside = (k < n_in - start)[None, :]
        x = tl.load(x_at + start, mask=inside & (m < rows)[:, None], other=0.0)
        w = tl.load(w_at + start, mask=inside & (n < n_out)[:, None], other=0.0)
        acc = add_product(acc, x, w)
    if BIAS:
        bias = tl.load(bias_ptr + expert * n_out + n, mask=n < n_out, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    stored = (m < rows)[:, None] & (n < n_out)[None, :]
    tl.store(y_ptr + row[:, None] * n_out + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=stored)
