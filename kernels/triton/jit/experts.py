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
    tiles_ptr,  # [tiles, 4] expert, first row, rows; see tiles_kernel
    n_in,
    n_out,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least the rows of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: one tile of rows and BLOCK_N outputs. Grid: (output blocks, tiles)."""
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    rows = tl.load(tiles_ptr + 4 * tile + 2)
    if rows == 0:  # left over
        return
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


@triton.jit(do_not_specialize=["tiles", "experts", "parts", "outputs"])
def tiles_kernel(
    ends_ptr,  # [experts] int64: where the rows of each end
    tiles_ptr,  # [tiles, 4] part of an expert, first row, rows, first output
    tiles,
    experts,
    parts,  # of each expert: all have the same rows
    outputs,  # of a part
    ROWS: tl.constexpr,  # of a tile at most
    EXPERTS: tl.constexpr,  # at least as many as there are
    BLOCK: tl.constexpr,
):
    """A program: BLOCK tiles, from the experts' first rows on. Those that are left over have no rows."""
    e = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + e, mask=e < experts, other=0).to(tl.int32)
    begins = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < experts), other=0).to(tl.int32)
    needed = (ends - begins + (ROWS - 1)) // ROWS
    last = tl.cumsum(needed, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (tile // parts)[:, None]
    own = (at >= (last - needed)[None, :]) & (at < last[None, :])
    first = begins[None, :] + (at - (last - needed)[None, :]) * ROWS
    rows = tl.sum(tl.where(own, tl.minimum(ends[None, :] - first, ROWS), 0), axis=1)
    part = tile % parts
    inside = tile < tiles
    to = tiles_ptr + 4 * tile
    tl.store(to, tl.sum(tl.where(own, e[None, :], 0), axis=1) * parts + part, mask=inside)
    tl.store(to + 1, tl.sum(tl.where(own, first, 0), axis=1), mask=inside)
    tl.store(to + 2, rows, mask=inside)
    tl.store(to + 3, part * outputs, mask=inside)
