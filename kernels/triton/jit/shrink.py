"""The shrink kernel: ``h[t, j] = A[slot(t), j] x[t]`` over tiles of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.product import add_product


@triton.jit
def shrink_kernel(
    x_ptr,  # [T, in], rows x_stride apart
    a_ptr,  # [S, n * R, in], slots slot_stride apart
    h_ptr,  # [T, n, R], contiguous
    tiles_ptr,  # [tiles, 4] slot, first token, tokens, rank
    partials_ptr,  # [tiles, n * rank blocks, SPLIT_K, BLOCK_M, BLOCK_R] float32; nothing if SPLIT_K is 1
    arrivals_ptr,  # [tiles, n * rank blocks] zeros, before and after
    x_stride,
    slot_stride,
    n_in,
    n_slices,
    max_rank,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """A program: one tile of tokens, BLOCK_R ranks of a slice, and one of SPLIT_K parts of the inputs.

    Of the programs that share an output, the one that comes last adds the parts up, always in the same
    order, so that equal launches give equal bits: the "semaphore" of split-K in CUTLASS, without atomic
    sums. Grid: (n * rank blocks * SPLIT_K, tiles).
    """
    tile = tl.program_id(1)
    columns = tl.num_programs(0) // SPLIT_K
    column = tl.program_id(0) // SPLIT_K
    split = tl.program_id(0) % SPLIT_K
    rank_blocks = columns // n_slices
    j = column // rank_blocks
    slot = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    rank = tl.load(tiles_ptr + 4 * tile + 3)
    if tokens == 0:  # padding
        return

    m = tl.arange(0, BLOCK_M)
    r = (column % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = (first + m).to(tl.int64)
    h_at = h_ptr + token[:, None] * (n_slices * max_rank) + j * max_rank + r[None, :]
    stored = (m < tokens)[:, None] & (r < max_rank)[None, :]
    if (column % rank_blocks) * BLOCK_R >= rank:  # beyond this adapter's rank
        if split == 0:
            tl.store(h_at, tl.zeros((BLOCK_M, BLOCK_R), h_ptr.dtype.element_ty), mask=stored)
        return

    k = tl.arange(0, BLOCK_K)
    length = tl.cdiv(n_in, BLOCK_K * SPLIT_K) * BLOCK_K
    begin = split * length
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    a_at = a_ptr + slot * slot_stride + (j * max_rank + r)[:, None] * n_in + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, tl.minimum(begin + length, n_in), BLOCK_K):
        inside = (k < n_in - start)[None, :]
        x = tl.load(x_at + start, mask=inside & (m < tokens)[:, None], other=0.0)
        a = tl.load(a_at + start, mask=inside & (r < rank)[:, None], other=0.0)
        acc = add_product(acc, x, a)

    if SPLIT_K > 1:
        output = tile * columns + column
        size: tl.constexpr = BLOCK_M * BLOCK_R
        part = partials_ptr + output.to(tl.int64) * (SPLIT_K * size)
        part += m[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tl.store(part + split * size, acc)
        tl.debug_barrier()  # every thread has stored, before one of them says so
        arrived = tl.atomic_add(arrivals_ptr + output, 1, sem="acq_rel", scope="gpu")
        if arrived != SPLIT_K - 1:
            return
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in range(SPLIT_K):  # past the L1 cache, which does not see what other programs stored
            acc += tl.load(part + i * size, cache_modifier=".cg")
        tl.store(arrivals_ptr + output, 0)

    # A token that is not finite makes NaN of zero rows, too; h is zero there all the same.
    acc = tl.where((r < rank)[None, :], acc, 0.0)
    tl.store(h_at, acc.to(h_ptr.dtype.element_ty), mask=stored)
