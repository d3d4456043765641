"""What weights of int8 and int4 stand for: rows that are rotated, and rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, block: int) -> Tensor:
    """Return ``x`` [..., k] in float32, with every ``block`` neighbours (a power of two) multiplied by a
    Hadamard matrix; 0: unchanged.

    The matrix is orthogonal and symmetric, so it is its own inverse, and the product of two rotated vectors
    equals that of the vectors.
    """
    x = x.float()
    if block == 0:
        return x
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = x.reshape(*x.shape[:-1], -1, block) @ matrix
    return blocks.div(block**0.5).flatten(-2)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of ``x`` [n, k] to int8. Returns these and the scales [n, 1]; their product is about
    ``x``."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / scale.where(scale > 0, 1)).round().to(torch.int8), scale
