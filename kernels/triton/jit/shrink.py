"""The shrink kernel: ``h[t, j] = A[slot(t), j] x[t]`` over tiles of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.product import add_product
from aioengine.kernels.triton.jit.slices import A_RANK, COLUMNS, A, scales


@triton.jit(do_not_specialize=["place", "n_slices", "table_stride"])
def shrink_kernel(
    x_ptr,  # [T, in], rows x_stride apart
    memory_ptr,  # [elements]
    scales_ptr,  # the same as float32, if it is INT8
    table_ptr,  # [S, places, COLUMNS], slots table_stride apart
    h_ptr,  # [T, n, width], contiguous
    tiles_ptr,  # [tiles, 4] slot, first token, tokens, rank
    partials_ptr,  # [tiles, n * rank blocks, PARTS, BLOCK_M, BLOCK_R] float32; nothing unless SPLIT
    arrivals_ptr,  # [tiles, n * rank blocks] zeros, before and after
    x_stride,
    table_stride,
    place,  # of the first slice
    unit,  # elements that offsets are counted in
    n_in,
    n_slices,
    width,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    INT8: tl.constexpr,  # whether A is, with a scale for each row
):
    """A program: one tile of tokens, BLOCK_R ranks of a slice, and all PARTS of the inputs, or, with SPLIT,
    one of them.

    Parts are summed each for itself and then added up in their order, whoever computes them, so that bits do
    not depend on SPLIT. Of the programs that share an output, the one that comes last adds them up: the
    "semaphore" of split-K in CUTLASS, without atomic sums. Grid: (n * rank blocks, times PARTS with SPLIT,
    tiles).
    """
    tile = tl.program_id(1)
    programs: tl.constexpr = PARTS if SPLIT else 1
    columns = tl.num_programs(0) // programs
    column = tl.program_id(0) // programs
    mine = tl.program_id(0) % programs
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
    h_at = h_ptr + token[:, None] * (n_slices * width) + j * width + r[None, :]
    stored = (m < tokens)[:, None] & (r < width)[None, :]
    row = table_ptr + slot * table_stride + (place + j) * COLUMNS
    rank = tl.minimum(rank, tl.load(row + A_RANK).to(tl.int32))  # this module's, where it has less
    if (column % rank_blocks) * BLOCK_R >= rank:
        if mine == 0:
            tl.store(h_at, tl.zeros((BLOCK_M, BLOCK_R), h_ptr.dtype.element_ty), mask=stored)
        return

    k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(n_in, BLOCK_K * PARTS)  # of a part
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    a_at = memory_ptr + tl.load(row + A) * unit + r[:, None] * n_in + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    end = tl.minimum((mine + PARTS // programs) * blocks, tl.cdiv(n_in, BLOCK_K))
    for block in range(mine * blocks, end):
        start = block * BLOCK_K
        inside = (k < n_in - start)[None, :]
        x = tl.load(x_at + start, mask=inside & (m < tokens)[:, None], other=0.0)
        a = tl.load(a_at + start, mask=inside & (r < rank)[:, None], other=0.0)
        acc = add_product(acc, x, a)
        # One loop over all parts, or the loads of the next would wait for the last of this. (Triton 3.9 does
        # not compile a tl.where here for B200, which keeps sums in a memory of their own.)
        if programs < PARTS:  # noqa: SIM102  (the compiler knows this one)
            if (block + 1) % blocks == 0:
                total += acc
                acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total += acc

    if SPLIT:
        output = tile * columns + column
        size: tl.constexpr = BLOCK_M * BLOCK_R
        sums = partials_ptr + output.to(tl.int64) * (PARTS * size)
        sums += m[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tl.store(sums + mine * size, total)
        tl.debug_barrier()  # every thread has stored, before one of them says so
        arrived = tl.atomic_add(arrivals_ptr + output, 1, sem="acq_rel", scope="gpu")
        if arrived != PARTS - 1:
            return
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in range(PARTS):  # past the L1 cache, which does not see what other programs stored
            total += tl.load(sums + i * size, cache_modifier=".cg")
        tl.store(arrivals_ptr + output, 0)

    if INT8:
        total *= scales(scales_ptr, row, unit, r, r < rank)[None, :]
    # A token that is not finite makes NaN of zero rows, too; h is zero there all the same.
    total = tl.where((r < rank)[None, :], total, 0.0)
    tl.store(h_at, total.to(h_ptr.dtype.element_ty), mask=stored)
