"""The attention kernel: tiles of query tokens against the keys that a block table leads to."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.product import add_dot


@triton.jit
def attention_kernel(
    qkv_ptr,  # [T, heads + 2 * kv_heads, D], rows q_stride apart
    keys_ptr,  # [cells, kv_heads, D], contiguous
    values_ptr,
    tables_ptr,  # [sequences, table_stride] blocks
    tiles_ptr,  # [tiles, 4] sequence, first row, tokens (0: padding, the row becomes 0), first position
    out_ptr,  # [T, heads, D], contiguous
    partials_ptr,  # [tiles, kv_heads, SPLITS, BLOCK_M, BLOCK_D] float32; nothing if SPLITS is 1
    stats_ptr,  # [tiles, kv_heads, SPLITS, 2, BLOCK_M] float32: the largest score, the sum of weights
    arrivals_ptr,  # [tiles, kv_heads] zeros, before and after
    q_stride,
    table_stride,
    window,  # 0: all keys
    scale,  # of the scores, times log2(e)
    GROUP: tl.constexpr,  # query heads of a key head
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # of the cache
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile times GROUP
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D
):
    """A program: one tile with all query heads of one key head, and one of SPLITS parts of the keys.

    Online softmax over BLOCK_N keys at a time: FlashAttention (Dao et al., 2022, arXiv:2205.14135); parts of
    the keys as in Flash-Decoding (Dao et al., 2023), and the last program to come adds them up, always in
    the same order. Grid: (tiles, key heads, SPLITS).
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    row = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    position = tl.load(tiles_ptr + 4 * tile + 3)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    token = m // GROUP
    # Padding has no tokens and sees no keys: its row becomes zeros.
    valid = (token < tl.maximum(tokens, 1))[:, None] & (d < D)[None, :]
    q_at = (
        (row + token).to(tl.int64)[:, None] * q_stride
        + (kv_head * GROUP + m % GROUP)[:, None] * D
        + d[None, :]
    )
    q = tl.load(qkv_ptr + q_at, mask=valid, other=0.0)
    last = position + token  # that a row may look at
    first = tl.where(window > 0, last - window + 1, 0)

    stop = position + tokens
    start = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0) // BLOCK_N * BLOCK_N
    length = tl.cdiv(tl.cdiv(stop - start, BLOCK_N), SPLITS) * BLOCK_N
    begin = start + split * length
    table_at = tables_ptr + sequence * table_stride
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(begin, tl.minimum(begin + length, stop), BLOCK_N):
        key = at + n
        # What lies beyond the sequence's end may be anything, NaN too: it is not read.
        there = (key < stop)[:, None] & (d < D)[None, :]
        block = tl.load(table_at + key // BLOCK_SIZE, mask=key < stop, other=0).to(tl.int64)
        cell = (block * BLOCK_SIZE + key % BLOCK_SIZE)[:, None]
        kv_at = (cell * kv_heads + kv_head) * D + d[None, :]
        k = tl.load(keys_ptr + kv_at, mask=there, other=0.0)
        v = tl.load(values_ptr + kv_at, mask=there, other=0.0)
        scores = add_dot(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), q, tl.trans(k)) * scale
        seen = (key[None, :] <= last[:, None]) & (key[None, :] >= first[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        zero = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen no key yet
        decay = tl.exp2(highest - zero)
        weights = tl.exp2(scores - zero[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        acc = add_dot(acc * decay[:, None], weights.to(v.dtype), v)
        highest = higher

    if SPLITS > 1:
        output = tile * kv_heads + kv_head
        size: tl.constexpr = BLOCK_M * BLOCK_D
        part = partials_ptr + output.to(tl.int64) * (SPLITS * size) + m[:, None] * BLOCK_D + d[None, :]
        stats = stats_ptr + output.to(tl.int64) * (SPLITS * 2 * BLOCK_M) + m
        tl.store(part + split * size, acc)
        tl.store(stats + split * 2 * BLOCK_M, highest)
        tl.store(stats + (split * 2 + 1) * BLOCK_M, total)
        tl.debug_barrier()  # every thread has stored, before one of them says so
        arrived = tl.atomic_add(arrivals_ptr + output, 1, sem="acq_rel", scope="gpu")
        if arrived != SPLITS - 1:
            return
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for i in range(SPLITS):  # past the L1 cache, which does not see what other programs stored
            its_highest = tl.load(stats + i * 2 * BLOCK_M, cache_modifier=".cg")
            higher = tl.maximum(highest, its_highest)
            zero = tl.where(higher == float("-inf"), 0.0, higher)
            decay = tl.exp2(highest - zero)
            its_decay = tl.exp2(its_highest - zero)
            total = total * decay + tl.load(stats + (i * 2 + 1) * BLOCK_M, cache_modifier=".cg") * its_decay
            its_acc = tl.load(part + i * size, cache_modifier=".cg")
            acc = acc * decay[:, None] + its_acc * its_decay[:, None]
            highest = higher
        tl.store(arrivals_ptr + output, 0)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = kv_heads * GROUP
    out_at = ((row + token).to(tl.int64)[:, None] * heads + (kv_head * GROUP + m % GROUP)[:, None]) * D + d[
        None, :
    ]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=valid)
