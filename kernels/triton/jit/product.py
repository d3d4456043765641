"""The products that the kernels are made of."""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def add_product(acc, rows, weights):
    """``acc + rows @ weights^T``; ``weights`` are rounded to the dtype of ``rows``. See :func:`add_dot`."""
    if weights.dtype == tl.int8:
        weights = weights.to(tl.float32)  # the interpreter takes an integer for the bits of a bfloat16
    return add_dot(acc, rows, tl.trans(weights.to(rows.dtype)))


@triton.jit
def add_dot(acc, a, b):
    """``acc + a @ b``, accumulated in float32, on tensor cores for 16-bit dtypes; float32 is not rounded to
    TF32."""
    if _INTERPRETED:
        # Its dot takes the bits of a bfloat16 for an integer, and leaves the order of sums to a library that
        # goes by shapes; in float64 the order does not matter.
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64), out_dtype=tl.float64)
        return wide.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
