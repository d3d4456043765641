"""Cells of a cache.

A cell is a token's place in a layer's cache [blocks, block_size, K, d]: block * block_size + offset. A cache
of bytes (uint8) has float8 (e4m3fn) in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_FLOAT8 = 448.0


def take(cache: Tensor, cells: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the rows [n, K, d] of ``cells`` [n], those of a float8 cache in ``dtype``."""
    rows = cache.view(-1, *cache.shape[2:]).index_select(0, cells)
    return rows if dtype is None or rows.dtype != torch.uint8 else rows.view(torch.float8_e4m3fn).to(dtype)


def put(cache: Tensor, cells: Tensor, rows: Tensor) -> None:
    """Store ``rows`` [n, K, d] in ``cells`` [n]; in float8 the nearest numbers, and NaN for infinity."""
    if cache.dtype == torch.uint8:
        rows = _narrow(rows).view(torch.uint8)
    cache.view(-1, *cache.shape[2:]).index_copy_(0, cells, rows)


def as_stored(rows: Tensor, cache: Tensor) -> Tensor:
    """Return ``rows`` [n, K, d] as :func:`take` would after :func:`put`."""
    return _narrow(rows).to(rows.dtype) if cache.dtype == torch.uint8 else rows


def _narrow(rows: Tensor) -> Tensor:
    finite = rows.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).where(rows.isfinite(), torch.nan)
    return finite.to(torch.float8_e4m3fn)
