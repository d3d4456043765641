"""Cells of a cache whose blocks may have other layers' between them.

A cell is a token's place in a layer's cache [blocks, block_size, K, d]: block * block_size + offset.
"""

from __future__ import annotations

from torch import Tensor


def take(cache: Tensor, cells: Tensor) -> Tensor:
    """Returns the rows [n, K, d] of ``cells`` [n]."""
    if cache.is_contiguous():
        return cache.flatten(0, 1).index_select(0, cells)
    size = cache.shape[1]
    return cache[cells // size, cells % size]


def put(cache: Tensor, cells: Tensor, rows: Tensor) -> None:
    """Stores ``rows`` [n, K, d] in ``cells`` [n]."""
    if cache.is_contiguous():
        cache.flatten(0, 1).index_copy_(0, cells, rows)
        return
    size = cache.shape[1]
    cache[cells // size, cells % size] = rows
