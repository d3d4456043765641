"""The product that both LoRA kernels are made of."""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def add_product(acc, rows, weights):
    """``acc + rows @ weights^T``, accumulated in float32; ``weights`` are rounded to the dtype of ``rows``.

    On tensor cores for 16-bit dtypes; float32 is not rounded to TF32.
    """
    weights = weights.to(rows.dtype)
    if _INTERPRETED:  # whose dot takes the bits of a bfloat16 for an integer
        rows = rows.to(tl.float32)
        weights = weights.to(tl.float32)
    return tl.dot(rows, tl.trans(weights), acc, input_precision="ieee")
