"""The product with a quantized weight: ``y = x W^T + bias``, where W is codes with scales for groups."""

from __future__ import annotations

import triton
import triton.language as tl

from aioengine.kernels.triton.jit.float8 import from_float4, from_float8
from aioengine.kernels.triton.jit.product import add_dot

INT4 = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
MXFP4 = tl.constexpr(3)


@triton.jit
def _values(codes, FORMAT: tl.constexpr):
    """The numbers that bytes stand for, as float32: int8, or float8 (e4m3fn)."""
    if FORMAT == FP8:
        return from_float8(codes)
    wide = codes.to(tl.int32)
    return tl.where(wide > 127, wide - 256, wide).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "middle", "group", "groups"])
def block_linear_kernel(
    x_ptr,  # [T, k], rows x_stride apart
    data_ptr,  # [n, k], or [n, k / 2] if the codes have four bits, bytes
    scale_ptr,  # [n, groups] float32; of MXFP4 exponents, bytes
    zero_ptr,  # [n, groups] int16, not read unless ZEROS
    group_of_ptr,  # [k] int32, not read unless ORDERED
    bias_ptr,  # [n], not read unless BIAS
    y_ptr,  # [T, n], rows y_stride apart
    tokens,
    n_out,
    k_in,
    x_stride,
    y_stride,
    group,  # inputs of a group, a multiple of BLOCK_K unless ORDERED
    groups,
    middle,  # the zero point without ZEROS
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    ORDERED: tl.constexpr,  # whether inputs of a group need not be neighbours
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: BLOCK_M tokens and BLOCK_N outputs. Grid: (token blocks, output blocks), so that programs
    next to each other read the same weights.

    Codes less their zero points are whole numbers that every dtype holds. They are multiplied with x on
    tensor cores and summed over BLOCK_K inputs, and the sum is scaled, in float32. So a weight is never
    rounded, and scaling costs BLOCK_M operations for BLOCK_K weights. Where inputs are ORDERED, every weight
    is scaled by itself, and rounded.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = m.to(tl.int64)
    inside_m = (m < tokens)[:, None]
    inside_n = n < n_out
    acc = _product(
        x_ptr + token[:, None] * x_stride,
        inside_m,
        n.to(tl.int64),
        inside_n,
        data_ptr,
        scale_ptr,
        zero_ptr,
        group_of_ptr,
        k_in,
        group,
        groups,
        middle,
        FORMAT,
        ZEROS,
        ORDERED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + token[:, None] * y_stride + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside_m & inside_n[None, :])


@triton.jit(do_not_specialize=["middle", "group", "groups"])
def expert_blocks_kernel(
    x_ptr,  # [S, k], contiguous
    parts_ptr,  # [parts, 3] addresses of data, scale and zero; see block_linear_kernel
    bias_ptr,  # [parts * n_part], not read unless BIAS
    y_ptr,  # [S, n_out], contiguous
    tiles_ptr,  # [tiles, 4] part, first row, rows, first output
    k_in,
    n_out,
    n_part,
    group,
    groups,
    middle,
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least the rows of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program: one tile of rows, and BLOCK_N outputs of a part of their expert's. Grid: (output blocks,
    tiles)."""
    tile = tl.program_id(1)
    part = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile + 1)
    rows = tl.load(tiles_ptr + 4 * tile + 2)
    column = tl.load(tiles_ptr + 4 * tile + 3)
    if rows == 0:  # left over
        return
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (first + m).to(tl.int64)
    inside_m = (m < rows)[:, None]
    inside_n = n < n_part
    data_ptr = tl.load(parts_ptr + 3 * part).to(tl.pointer_type(tl.uint8))
    if FORMAT == MXFP4:
        scale_ptr = tl.load(parts_ptr + 3 * part + 1).to(tl.pointer_type(tl.uint8))
    else:
        scale_ptr = tl.load(parts_ptr + 3 * part + 1).to(tl.pointer_type(tl.float32))
    zero_ptr = tl.load(parts_ptr + 3 * part + 2).to(tl.pointer_type(tl.int16))
    data_ptr = tl.multiple_of(data_ptr, 16)  # see StackedWeight.addresses
    acc = _product(
        x_ptr + row[:, None] * k_in,
        inside_m,
        n.to(tl.int64),
        inside_n,
        data_ptr,
        scale_ptr,
        zero_ptr,
        tiles_ptr,
        k_in,
        group,
        groups,
        middle,
        FORMAT,
        ZEROS,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if BIAS:
        bias = tl.load(bias_ptr + part * n_part + n, mask=inside_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_at = y_ptr + row[:, None] * n_out + (column + n)[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside_m & inside_n[None, :])


@triton.jit
def _product(
    rows_at,  # [BLOCK_M, 1] pointers to the rows of x
    inside_m,
    row,  # [BLOCK_N] those of the weight
    inside_n,
    data_ptr,
    scale_ptr,
    zero_ptr,
    group_of_ptr,
    k_in,
    group,
    groups,
    middle,
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of x times those of a weight, [BLOCK_M, BLOCK_N], in float32."""
    k = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = rows_at.dtype.element_ty
    HALF: tl.constexpr = BLOCK_K // 2
    half = tl.arange(0, HALF)
    FOUR_BITS: tl.constexpr = (FORMAT == INT4) | (FORMAT == MXFP4)
    x_at = rows_at + k[None, :]
    if FOUR_BITS:
        data_at = data_ptr + row[:, None] * (k_in // 2) + half[None, :]
    else:
        data_at = data_ptr + row[:, None] * k_in + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k_in, BLOCK_K):
        x = tl.load(x_at + start, mask=inside_m & (k < k_in - start)[None, :], other=0.0)
        place = row * groups + start // group
        if FOUR_BITS:
            inside = inside_n[:, None] & (half < (k_in - start) // 2)[None, :]
            packed = tl.load(data_at + start // 2, mask=inside, other=0).to(tl.int32)
            # A byte has the codes of two neighbours.
            if FORMAT == MXFP4:
                low = from_float4(packed)
                high = from_float4(packed >> 4)
            else:
                low = (packed & 15).to(tl.float32)
                high = (packed >> 4).to(tl.float32)
            if ORDERED:
                at = start + 2 * half
                low = _scaled(low, scale_ptr, zero_ptr, group_of_ptr, row, at, inside, groups, middle, ZEROS)
                high = _scaled(
                    high, scale_ptr, zero_ptr, group_of_ptr, row, at + 1, inside, groups, middle, ZEROS
                )
            else:
                if FORMAT == INT4:
                    zero = _zero(zero_ptr, place, inside_n, middle, ZEROS)[:, None]
                    low -= zero
                    high -= zero
            if dtype == tl.float32:  # not for tensor cores: halves leave registers free
                even, odd = tl.split(tl.reshape(x, (BLOCK_M, HALF, 2)))
                part = add_dot(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), even, tl.trans(low))
                part = add_dot(part, odd, tl.trans(high))
            else:  # one product, because sums of a second one would change their layout on Hopper
                value = tl.reshape(tl.join(low.to(dtype), high.to(dtype)), (BLOCK_N, BLOCK_K))
                part = add_dot(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, tl.trans(value))
        else:
            inside = inside_n[:, None] & (k < k_in - start)[None, :]
            value = _values(tl.load(data_at + start, mask=inside, other=0), FORMAT)
            if ORDERED:
                at = start + k
                value = _scaled(
                    value, scale_ptr, zero_ptr, group_of_ptr, row, at, inside, groups, middle, ZEROS
                )
            else:
                if FORMAT == INT8:
                    value -= _zero(zero_ptr, place, inside_n, middle, ZEROS)[:, None]
            part = add_dot(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, tl.trans(value.to(dtype)))
        if ORDERED:
            acc += part
        else:
            acc += part * _scale(scale_ptr, place, inside_n, FORMAT)[None, :]
    return acc


@triton.jit
def _scale(scale_ptr, place, inside, FORMAT: tl.constexpr):
    """The scales of a group of each row."""
    if FORMAT == MXFP4:
        exponents = tl.load(scale_ptr + place, mask=inside, other=0).to(tl.int32)
        found = tl.maximum(exponents << 23, 1 << 22).to(tl.float32, bitcast=True)
    else:  # not after a return: the compiler would look at this for exponents, too
        found = tl.load(scale_ptr + place, mask=inside, other=0.0)
    return found


@triton.jit
def _zero(zero_ptr, place, inside, middle, ZEROS: tl.constexpr):
    """The zero points of a group of each row, as float32."""
    if ZEROS:
        return tl.load(zero_ptr + place, mask=inside, other=0).to(tl.float32)
    return tl.zeros(place.shape, tl.float32) + middle


@triton.jit
def _scaled(value, scale_ptr, zero_ptr, group_of_ptr, row, at, inside, groups, middle, ZEROS: tl.constexpr):
    """Codes [rows, inputs] as weights, by the group of each input."""
    column = tl.max(inside.to(tl.int32), axis=0) > 0
    place = row.to(tl.int32)[:, None] * groups + tl.load(group_of_ptr + at, mask=column, other=0)[None, :]
    if ZEROS:
        value -= tl.load(zero_ptr + place, mask=inside, other=0).to(tl.float32)
    else:
        value -= middle
    return value * tl.load(scale_ptr + place, mask=inside, other=0.0)
