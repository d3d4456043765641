"""Float8 (e4m3fn) and float4 (e2m1), with integers and float32 alone: so no GPU needs to know the types."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def from_float8(codes):
    """The numbers that bytes stand for, as float32, but 480 for those that are no numbers.

    The exponent is moved to where a float32 has its own, which makes it 2^120 times too small, of subnormal
    numbers, too.
    """
    wide = codes.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def from_float4(codes):
    """The numbers that the lowest four bits stand for, as float32."""
    size = codes & 7
    bits = tl.where(size > 1, (size << 22) + 0x3F000000, size * 0x3F000000)
    return (bits | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def to_float8(x):
    """The bytes of the nearest numbers, of two the even one; 448 beyond that. What is not finite is none."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # Below 2^-6 steps are 2^-9, which those of a float32 at 2^14 are, too.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(tl.abs(x) < float("inf"), code, 0x7F)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
