"""Ranges of a dimension that are taken together, one after the other.

No torch is imported with this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Ranges = tuple[slice, ...]
"""One at least. More where one matrix has several linears below each other, of each of which a rank has a
part."""

EVERYTHING: Ranges = (slice(None),)


def count(ranges: Ranges, size: int) -> int:
    """Return how many of ``size`` elements are in the ranges."""
    return sum(len(range(size)[part]) for part in ranges)


def take(tensor: Tensor, ranges: Ranges) -> Tensor:
    """Return rows of ``tensor`` [n, ...]: a view if there is one range, else a copy."""
    if len(ranges) == 1:
        return tensor[ranges[0]]
    from torch import cat

    return cat([tensor[part] for part in ranges])
