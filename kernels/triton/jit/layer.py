"""The kernels between a layer's linears, each one pass over its data."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    hidden_ptr,  # [T, size], contiguous; overwritten with the sum
    delta_ptr,  # [T, size], contiguous; not read unless ADD
    weight_ptr,  # [size]
    out_ptr,  # [T, size], contiguous
    size,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,  # at least size
):
    """``hidden += delta``, and its norm. Grid: (T,)."""
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    dtype: tl.constexpr = hidden.dtype
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + delta.to(tl.float32)).to(dtype)
        tl.store(hidden_ptr + at, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (normed * weight).to(dtype), mask=inside)


@triton.jit
def silu_and_mul_kernel(
    gate_up_ptr,  # [T, 2 * size], contiguous
    out_ptr,  # [T, size], contiguous
    size,
    BLOCK: tl.constexpr,
):
    """Grid: (T, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up_ptr + row * 2 * size + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = gate.dtype
    wide = gate.to(tl.float32)
    e = tl.exp(-tl.abs(wide))  # which cannot overflow
    silu = (wide * tl.where(wide < 0, e, 1.0) / (1.0 + e)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + column, (silu * up).to(dtype), mask=inside)


@triton.jit
def rope_store_kernel(
    qkv_ptr,  # [T, heads + 2 * kv_heads, 2 * half], contiguous; the queries are overwritten
    q_norm_ptr,  # [2 * half], not read unless NORM
    k_norm_ptr,
    cos_ptr,  # [T, half] float32
    sin_ptr,
    cells_ptr,  # [T], below 0: nothing is stored
    keys_ptr,  # [blocks, BLOCK_SIZE, kv_heads, 2 * half], blocks block_stride elements apart
    values_ptr,
    block_stride,
    heads,
    kv_heads,
    half,
    eps,
    NORM: tl.constexpr,
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
    at = qkv_ptr + (token * (heads + 2 * kv_heads) + head) * (2 * half) + d
    x1 = tl.load(at, mask=inside, other=0.0)
    x2 = tl.load(at + half, mask=inside, other=0.0)
    dtype: tl.constexpr = x1.dtype
    wide1 = x1.to(tl.float32)
    wide2 = x2.to(tl.float32)

    if NORM:
        squares = tl.sum(wide1 * wide1 + wide2 * wide2, axis=1)[:, None]
        scale = tl.rsqrt(squares / (2 * half) + eps)
        weight_at = tl.where(is_q, q_norm_ptr + d, k_norm_ptr + d)
        normed = inside & (head < heads + kv_heads)
        weight1 = tl.load(weight_at, mask=normed, other=0.0).to(tl.float32)
        weight2 = tl.load(weight_at + half, mask=normed, other=0.0).to(tl.float32)
        wide1 = ((wide1 * scale).to(dtype).to(tl.float32) * weight1).to(dtype).to(tl.float32)
        wide2 = ((wide2 * scale).to(dtype).to(tl.float32) * weight2).to(dtype).to(tl.float32)

    cos = tl.load(cos_ptr + token * half + d, mask=d < half, other=0.0)
    sin = tl.load(sin_ptr + token * half + d, mask=d < half, other=0.0)
    x1 = tl.where(is_v, x1, (wide1 * cos - wide2 * sin).to(dtype))
    x2 = tl.where(is_v, x2, (wide2 * cos + wide1 * sin).to(dtype))
    tl.store(at, x1, mask=inside & is_q)
    tl.store(at + half, x2, mask=inside & is_q)

    cell = tl.load(cells_ptr + token)
    if cell >= 0:
        stored = inside & (head >= heads)
        kv_head = tl.where(is_v, head - heads - kv_heads, head - heads)
        block_at = cell // BLOCK_SIZE * block_stride
        cell_at = block_at + (cell % BLOCK_SIZE * kv_heads + kv_head) * (2 * half)
        to = tl.where(is_v, values_ptr + d, keys_ptr + d) + cell_at
        tl.store(to, x1, mask=stored)
        tl.store(to + half, x2, mask=stored)
