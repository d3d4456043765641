"""The kernels between a layer's linears, each one pass over its data."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.float8 import to_float8


@triton.jit
def add_rms_norm_kernel(
    hidden_ptr,  # [T, size], contiguous; overwritten with the sum
    delta_ptr,  # [T, size], contiguous; not read unless ADD
    weight_ptr,  # [size]
    out_ptr,  # [T, size], contiguous
    size,
    stride,  # elements from one row to the next, in all of them
    eps,
    offset,  # of the weight; nothing if ROUNDED
    factor,  # of delta
    ADD: tl.constexpr,
    ROUNDED: tl.constexpr,  # before the weight
    BLOCK: tl.constexpr,  # at least size
):
    """``hidden += factor * delta``, and its norm. Grid: (T,)."""
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = tl.program_id(0).to(tl.int64) * stride + column
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    dtype: tl.constexpr = hidden.dtype
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + factor * delta.to(tl.float32)).to(dtype)
        tl.store(hidden_ptr + at, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = wide * scale
    normed = normed.to(dtype).to(tl.float32) * weight if ROUNDED else normed * (weight + offset)
    tl.store(out_ptr + at, normed.to(dtype), mask=inside)


KINDS = ("silu", "gelu", "clamped")
"""Activations, by the numbers that :func:`activate_kernel` has for them."""


@triton.jit
def activate_kernel(
    gate_up_ptr,  # [T, 2 * size], contiguous
    out_ptr,  # [T, size], contiguous
    size,
    alpha,  # of clamped_swiglu, as limit; else nothing
    limit,
    KIND: tl.constexpr,  # an index of KINDS
    BLOCK: tl.constexpr,
):
    """The activation of the gate, times up; see ``Backend``. Grid: (T, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up_ptr + row * 2 * size + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = gate.dtype
    wide = gate.to(tl.float32)
    if KIND == 2:
        wide = tl.where(wide > limit, limit, wide)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    z = wide * alpha if KIND == 2 else wide
    if KIND == 1:
        z = (wide + 0.044715 * wide * wide * wide) * 1.5957691216  # 2 sqrt(2 / pi)
    e = tl.exp(-tl.abs(z))  # which cannot overflow
    active = wide * tl.where(z < 0, e, 1.0) / (1.0 + e)
    if KIND != 2:
        active = active.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + column, (active * up).to(dtype), mask=inside)


@triton.jit
def rope_store_kernel(
    qkv_ptr,  # [T, heads + 2 * kv_heads, 2 * half], contiguous; the queries are overwritten
    q_norm_ptr,  # [2 * half], not read unless NORM
    k_norm_ptr,
    cos_ptr,  # [T, rotated] float32
    sin_ptr,
    cells_ptr,  # [T], below 0: nothing is stored
    keys_ptr,  # [blocks, BLOCK_SIZE, kv_heads, 2 * half], blocks block_stride elements apart; bytes: float8
    values_ptr,
    block_stride,
    heads,
    kv_heads,
    half,  # pairs of a head
    rotated,  # pairs that are rotated
    eps,
    offset,  # of the norms' weights; nothing if ROUNDED
    NORM: tl.constexpr,
    ROUNDED: tl.constexpr,  # before the norms' weights
    NEIGHBOURS: tl.constexpr,  # whether a pair is (2 d, 2 d + 1), instead of (d, d + rotated)
    PARTIAL: tl.constexpr,  # whether there are pairs that are not rotated: neighbours, behind the others
    BLOCK_SIZE: tl.constexpr,  # of the cache
    BLOCK_H: tl.constexpr,  # heads of a program
    BLOCK_D: tl.constexpr,  # at least half
):
    """Norms, rotates and stores BLOCK_H of one token's heads. Grid: (T, blocks of heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    is_q = head < heads
    is_v = head >= heads + kv_heads
    inside = (head < heads + 2 * kv_heads) & (d < half)
    first = d
    second = d + half
    if NEIGHBOURS:
        first = 2 * d
        second = 2 * d + 1
    elif PARTIAL:
        first = tl.where(d < rotated, d, 2 * d)
        second = tl.where(d < rotated, d + rotated, 2 * d + 1)
    at = qkv_ptr + (token * (heads + 2 * kv_heads) + head) * (2 * half)
    x1 = tl.load(at + first, mask=inside, other=0.0)
    x2 = tl.load(at + second, mask=inside, other=0.0)
    dtype: tl.constexpr = x1.dtype
    wide1 = x1.to(tl.float32)
    wide2 = x2.to(tl.float32)

    if NORM:
        squares = tl.sum(wide1 * wide1 + wide2 * wide2, axis=1)[:, None]
        scale = tl.rsqrt(squares / (2 * half) + eps)
        normed = inside & (head < heads + kv_heads)
        weight_at1 = tl.where(is_q, q_norm_ptr + first, k_norm_ptr + first)
        weight_at2 = tl.where(is_q, q_norm_ptr + second, k_norm_ptr + second)
        weight1 = tl.load(weight_at1, mask=normed, other=0.0).to(tl.float32)
        weight2 = tl.load(weight_at2, mask=normed, other=0.0).to(tl.float32)
        if ROUNDED:
            wide1 = ((wide1 * scale).to(dtype).to(tl.float32) * weight1).to(dtype).to(tl.float32)
            wide2 = ((wide2 * scale).to(dtype).to(tl.float32) * weight2).to(dtype).to(tl.float32)
        else:
            wide1 = (wide1 * scale * (weight1 + offset)).to(dtype).to(tl.float32)
            wide2 = (wide2 * scale * (weight2 + offset)).to(dtype).to(tl.float32)

    cos = tl.load(cos_ptr + token * rotated + d, mask=d < rotated, other=1.0)
    sin = tl.load(sin_ptr + token * rotated + d, mask=d < rotated, other=0.0)
    x1 = tl.where(is_v, x1, (wide1 * cos - wide2 * sin).to(dtype))
    x2 = tl.where(is_v, x2, (wide2 * cos + wide1 * sin).to(dtype))
    tl.store(at + first, x1, mask=inside & is_q)
    tl.store(at + second, x2, mask=inside & is_q)

    cell = tl.load(cells_ptr + token)
    if cell >= 0:
        stored = inside & (head >= heads)
        kv_head = tl.where(is_v, head - heads - kv_heads, head - heads)
        block_at = cell // BLOCK_SIZE * block_stride
        cell_at = block_at + (cell % BLOCK_SIZE * kv_heads + kv_head) * (2 * half)
        to = tl.where(is_v, values_ptr, keys_ptr) + cell_at
        if keys_ptr.dtype.element_ty == tl.uint8:
            tl.store(to + first, to_float8(x1.to(tl.float32)), mask=stored)
            tl.store(to + second, to_float8(x2.to(tl.float32)), mask=stored)
        else:
            tl.store(to + first, x1, mask=stored)
            tl.store(to + second, x2, mask=stored)
