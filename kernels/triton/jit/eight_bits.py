"""Products in eight bits: rows of activations as codes with scales, and their product with a weight."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.float8 import from_float8, to_float8

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: what is added to it is rounded to the nearest whole number, of two the even one."""

_LEAST = tl.constexpr(1.2e-38)
"""The inverse of a smaller scale may be infinite: such rows count as zeros."""


@triton.jit(do_not_specialize=["groups", "group"])
def round_rows_kernel(
    x_ptr,  # [T, k], rows x_stride apart
    codes_ptr,  # [T, k] bytes
    scales_ptr,  # [T, groups] float32
    k_in,
    x_stride,
    groups,
    group,  # inputs of a group
    FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: a group of one row. The largest magnitude becomes the largest code. Grid: (T, groups)."""
    token = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * group
    end = tl.minimum(begin + group, k_in)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * x_stride + at, mask=at < end, other=0.0).to(tl.float32)
        # A value that is no number is the largest, so that all of the row are none.
        largest = tl.maximum(largest, tl.where(x == x, tl.abs(x), float("inf")))
    scale = tl.max(largest, axis=0) / (448.0 if FLOAT8 else 127.0)
    scale = tl.where(scale < _LEAST, 0.0, scale)
    inverse = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
    scale = tl.where(scale < float("inf"), scale, float("nan"))
    tl.store(scales_ptr + token * groups + tl.program_id(1), scale)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * x_stride + at, mask=at < end, other=0.0).to(tl.float32)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0) * inverse
        code = to_float8(x) if FLOAT8 else ((x + _ROUND) - _ROUND).to(tl.int32).to(tl.uint8)
        tl.store(codes_ptr + token * k_in + at, code, mask=at < end)


@triton.jit
def _products(a, b, FLOAT8: tl.constexpr):
    """``a @ b^T`` of codes [M, K] and [N, K], as float32: exact sums of int8's. Those of float8 are added up
    for K inputs on tensor cores, and then in float32, because these keep few bits of a sum."""
    if _INTERPRETED:
        # Its dot takes codes for other numbers.
        if FLOAT8:
            wide_a, wide_b = from_float8(a), from_float8(b)
        else:
            wide_a, wide_b = _signed(a), _signed(b)
        return tl.dot(wide_a.to(tl.float64), tl.trans(wide_b).to(tl.float64), out_dtype=tl.float64).to(
            tl.float32
        )
    if FLOAT8:  # without the limit, the compiler may have tensor cores add up all inputs after all
        a = a.to(tl.float8e4nv, bitcast=True)
        return tl.dot(a, tl.trans(b.to(tl.float8e4nv, bitcast=True)), max_num_imprecise_acc=a.shape[1])
    return tl.dot(a.to(tl.int8, bitcast=True), tl.trans(b.to(tl.int8, bitcast=True)), out_dtype=tl.int32).to(
        tl.float32
    )


@triton.jit
def _signed(codes):
    wide = codes.to(tl.int32)
    return tl.where(wide > 127, wide - 256, wide).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "group", "groups"])
def eight_bits_kernel(
    codes_ptr,  # [T, k] bytes
    row_scales_ptr,  # [T, groups] float32
    data_ptr,  # [n, k] bytes
    scale_ptr,  # [n, groups] float32
    bias_ptr,  # [n], not read unless BIAS
    y_ptr,  # [T, n], rows y_stride apart
    tokens,
    n_out,
    k_in,
    y_stride,
    group,  # inputs of a group, a multiple of BLOCK_K
    groups,
    FLOAT8: tl.constexpr,
    WHOLE: tl.constexpr,  # whether there is one group
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: BLOCK_M tokens and BLOCK_N outputs. Grid: (token blocks, output blocks), so that programs
    next to each other read the same weights."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside_m = m < tokens
    inside_n = n < n_out
    token = m.to(tl.int64)
    row = n.to(tl.int64)
    x_at = codes_ptr + token[:, None] * k_in + k[None, :]
    data_at = data_ptr + row[:, None] * k_in + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k_in, BLOCK_K):
        there = (k < k_in - start)[None, :]
        x = tl.load(x_at + start, mask=inside_m[:, None] & there, other=0)
        weight = tl.load(data_at + start, mask=inside_n[:, None] & there, other=0)
        part = _products(x, weight, FLOAT8)
        if not WHOLE:
            column = start // group
            of_row = tl.load(row_scales_ptr + token * groups + column, mask=inside_m, other=0.0)
            of_output = tl.load(scale_ptr + row * groups + column, mask=inside_n, other=0.0)
            part = part * of_row[:, None] * of_output[None, :]
        acc += part
    if WHOLE:
        acc *= tl.load(row_scales_ptr + token, mask=inside_m, other=0.0)[:, None]
        acc *= tl.load(scale_ptr + row, mask=inside_n, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + token[:, None] * y_stride + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])
