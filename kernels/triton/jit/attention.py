"""The attention kernel: tiles of query tokens against the keys that a block table leads to."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.float8 import from_float8
from aioengine.kernels.triton.jit.product import add_dot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def join(highest, total, acc, part_highest, part_total, part_acc):
    """The state of an online softmax with that of the keys that follow."""
    higher = tl.maximum(highest, part_highest)
    zero = tl.where(higher == float("-inf"), 0.0, higher)
    decay = tl.exp2(highest - zero)
    part_decay = tl.exp2(part_highest - zero)
    acc = acc * decay[:, None] + part_acc * part_decay[:, None]
    return higher, total * decay + part_total * part_decay, acc


@triton.jit
def _read(at, there, dtype: tl.constexpr, WHOLE: tl.constexpr):
    """Keys or values of a cache, in the dtype of queries; zeros where nothing is, unless they are WHOLE."""
    stored = tl.load(at) if WHOLE else tl.load(at, mask=there, other=0)
    if at.dtype.element_ty == tl.uint8:
        found = tl.where((stored & 0x7F) == 0x7F, float("nan"), from_float8(stored)).to(dtype)
    else:
        found = stored
    return found


@triton.jit
def _over_keys(
    highest,
    total,
    acc,
    part_highest,
    part_total,
    part_acc,
    begin,
    until,
    end,
    q,
    keys_ptr,
    values_ptr,
    block_stride,
    table_at,
    head,
    kv_heads,
    stop,
    first,
    last,
    scale,
    soft_cap,
    parts,
    stats,
    first_part,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """The states of the parts so far and of the present one, after the keys from ``begin`` until ``until``.
    Those of the program end at ``end``. If they are not MASKED, every row sees all of them."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    WIDENED: tl.constexpr = keys_ptr.dtype.element_ty == tl.uint8
    WHOLE: tl.constexpr = not MASKED and D == BLOCK_D
    for at in tl.range(begin, until, BLOCK_N, num_stages=STAGES):
        key = at + n
        there = (d < D)[None, :]
        if MASKED:
            # What lies beyond the sequence's end may be anything, NaN too: it is not read.
            there = (key < stop)[:, None] & there
            block = tl.load(table_at + key // BLOCK_SIZE, mask=key < stop, other=0).to(tl.int64)
        else:
            block = tl.load(table_at + key // BLOCK_SIZE).to(tl.int64)
        cell_at = block * block_stride + (key % BLOCK_SIZE * kv_heads + head) * D
        kv_at = cell_at[:, None] + d[None, :]
        k = _read(keys_ptr + kv_at, there, q.dtype, WHOLE)
        if not WIDENED:
            v = _read(values_ptr + kv_at, there, q.dtype, WHOLE)
        scores = add_dot(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), q, tl.trans(k)) * scale
        if CAPPED:
            e = tl.exp(-2.0 * tl.abs(scores / soft_cap))  # of tanh; it cannot overflow
            capped = soft_cap * (1.0 - e) / (1.0 + e)
            scores = tl.where(scores < 0.0, -capped, capped)
        if MASKED:
            seen = key[None, :] <= last[:, None]
            if WINDOWED:
                seen = seen & (key[None, :] >= first[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(part_highest, tl.max(scores, axis=1))
        zero = higher
        if MASKED:  # of a row that has seen no key yet
            zero = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp2(part_highest - zero)
        weights = tl.exp2(scores - zero[:, None])
        part_total = part_total * decay + tl.sum(weights, axis=1)
        if WIDENED:  # as late as possible: wide values take registers
            v = _read(values_ptr + kv_at, there, q.dtype, WHOLE)
        part_acc = add_dot(part_acc * decay[:, None], weights.to(v.dtype), v)
        part_highest = higher
        if ((at + BLOCK_N) % PART == 0) | (at + BLOCK_N >= end):  # a part ends
            if SPLITS > 1:
                i = at // PART - first_part
                tl.store(parts + i * (BLOCK_M * BLOCK_D), part_acc)
                tl.store(stats + i * 2 * BLOCK_M, part_highest)
                tl.store(stats + (i * 2 + 1) * BLOCK_M, part_total)
            else:
                highest, total, acc = join(highest, total, acc, part_highest, part_total, part_acc)
            part_highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            part_total = tl.zeros((BLOCK_M,), tl.float32)
            part_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return highest, total, acc, part_highest, part_total, part_acc


@triton.jit(do_not_specialize=["most_parts", "table_stride", "window"])
def attention_kernel(
    qkv_ptr,  # [T, heads + 2 * kv_heads, D], rows q_stride apart
    keys_ptr,  # [blocks, BLOCK_SIZE, kv_heads, D], blocks block_stride elements apart; bytes are float8
    values_ptr,
    tables_ptr,  # [sequences, table_stride] blocks
    tiles_ptr,  # [tiles, 4] sequence, first row, tokens (0: the row becomes 0, -1: none), first position
    out_ptr,  # [T, heads, D], contiguous
    partials_ptr,  # [tiles, kv_heads, most_parts, BLOCK_M, BLOCK_D] float32; nothing if SPLITS is 1
    stats_ptr,  # [tiles, kv_heads, most_parts, 2, BLOCK_M] float32: the largest score, the sum of weights
    sinks_ptr,  # [heads] scores of keys without values, not read unless SINKS
    arrivals_ptr,  # [tiles, kv_heads] zeros, before and after
    block_stride,
    most_parts,  # that any tile has
    q_stride,
    table_stride,
    window,  # not read unless WINDOWED
    scale,  # of the scores, times log2(e)
    soft_cap,  # of the scores, times log2(e); nothing unless CAPPED
    GROUP: tl.constexpr,  # query heads of a key head
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # of the cache
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least the tokens of a tile times GROUP
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D
    PART: tl.constexpr,  # keys of a part, a multiple of BLOCK_N
    WINDOWED: tl.constexpr,
    STAGES: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """A program: one tile with all query heads of one key head, and its share of the parts of the keys.

    Online softmax over BLOCK_N keys at a time: FlashAttention (Dao et al., 2022, arXiv:2205.14135). Parts of
    the keys as in Flash-Decoding (Dao et al., 2023), but of fixed length, so that bits do not depend on how
    many programs (SPLITS) share them. They are joined in their order, by the program itself or, if there are
    several, by the last one to come. Grid: (tiles, key heads, SPLITS).
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    row = tl.load(tiles_ptr + 4 * tile + 1)
    tokens = tl.load(tiles_ptr + 4 * tile + 2)
    position = tl.load(tiles_ptr + 4 * tile + 3)
    if tokens < 0:  # padding without a row
        return

    m = tl.arange(0, BLOCK_M)
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
    first = last
    start = 0
    if WINDOWED:
        first = last - window + 1
        start = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N

    stop = position + tokens
    first_part = start // PART
    count = tl.cdiv(stop, PART) - first_part
    share = tl.cdiv(count, SPLITS)
    begin = tl.maximum((first_part + split * share) * PART, start)
    end = tl.minimum((first_part + (split + 1) * share) * PART, stop)
    output = tile * kv_heads + kv_head
    size: tl.constexpr = BLOCK_M * BLOCK_D
    parts = partials_ptr + output.to(tl.int64) * most_parts * size + m[:, None] * BLOCK_D + d[None, :]
    stats = stats_ptr + output.to(tl.int64) * most_parts * (2 * BLOCK_M) + m
    table_at = tables_ptr + sequence * table_stride
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    part_highest = highest
    part_total = total
    part_acc = acc
    # Masks are for the blocks at the window's edge, and for those that not every token sees to their end:
    # there are few, for which two stages are enough, and one where those of more would not fit in registers.
    WIDENED: tl.constexpr = keys_ptr.dtype.element_ty == tl.uint8
    FULL: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32
    PADDED: tl.constexpr = D < BLOCK_D and BLOCK_M == 64
    EDGE_STAGES: tl.constexpr = 1 if (WIDENED or FULL) or (PADDED or (WINDOWED and BLOCK_M >= 64)) else 2
    clear = begin
    if WINDOWED:
        clear = tl.cdiv(tl.maximum(stop - window, 0), BLOCK_N) * BLOCK_N
        clear = tl.minimum(tl.maximum(clear, begin), end)
        highest, total, acc, part_highest, part_total, part_acc = _over_keys(
            highest, total, acc, part_highest, part_total, part_acc, begin, clear, end,
            q, keys_ptr, values_ptr, block_stride, table_at, kv_head, kv_heads, stop, first, last,
            scale, soft_cap, parts, stats, first_part, True, EDGE_STAGES, WINDOWED,
            D, BLOCK_SIZE, SPLITS, BLOCK_M, BLOCK_N, BLOCK_D, PART, CAPPED,
        )  # fmt: skip
    edge = tl.minimum(tl.maximum((position + 1) // BLOCK_N * BLOCK_N, clear), end)
    highest, total, acc, part_highest, part_total, part_acc = _over_keys(
        highest, total, acc, part_highest, part_total, part_acc, clear, edge, end,
        q, keys_ptr, values_ptr, block_stride, table_at, kv_head, kv_heads, stop, first, last,
        scale, soft_cap, parts, stats, first_part, False, STAGES, WINDOWED,
        D, BLOCK_SIZE, SPLITS, BLOCK_M, BLOCK_N, BLOCK_D, PART, CAPPED,
    )  # fmt: skip
    highest, total, acc, part_highest, part_total, part_acc = _over_keys(
        highest, total, acc, part_highest, part_total, part_acc, edge, end, end,
        q, keys_ptr, values_ptr, block_stride, table_at, kv_head, kv_heads, stop, first, last,
        scale, soft_cap, parts, stats, first_part, True, EDGE_STAGES, WINDOWED,
        D, BLOCK_SIZE, SPLITS, BLOCK_M, BLOCK_N, BLOCK_D, PART, CAPPED,
    )  # fmt: skip

    if SPLITS > 1:
        tl.debug_barrier()  # every thread has stored, before one of them says so
        arrived = tl.atomic_add(arrivals_ptr + output, 1, sem="acq_rel", scope="gpu")
        if arrived != SPLITS - 1:
            return
        for i in range(count):
            # Past the L1 cache, which does not see what other programs stored.
            part_highest = tl.load(stats + i * 2 * BLOCK_M, cache_modifier=".cg")
            part_total = tl.load(stats + (i * 2 + 1) * BLOCK_M, cache_modifier=".cg")
            part_acc = tl.load(parts + i * size, cache_modifier=".cg")
            highest, total, acc = join(highest, total, acc, part_highest, part_total, part_acc)
        tl.store(arrivals_ptr + output, 0)

    if SINKS:  # as if these keys came last
        sink = tl.load(sinks_ptr + kv_head * GROUP + m % GROUP).to(tl.float32) * LOG2_E
        higher = tl.maximum(highest, sink)
        decay = tl.exp2(highest - higher)
        total = total * decay + tl.exp2(sink - higher)
        acc = acc * decay[:, None]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = kv_heads * GROUP
    out_at = ((row + token).to(tl.int64)[:, None] * heads + (kv_head * GROUP + m % GROUP)[:, None]) * D + d[
        None, :
    ]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=valid)
