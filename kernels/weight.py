"""A linear's weight in any form of storage: plain, rearranged, or quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

PIECE_ELEMENTS = 1 << 22
"""Number of elements of a weight that are expanded at a time, so that a product takes little extra memory:
20 bytes each, counted in :mod:`aioengine.model.cuda.working_memory`."""


class Weight(Protocol):
    """A matrix [n, k] with any form of storage.

    The code that makes a weight chooses the form for the device: a weight that is packed for the CPU library
    cannot be used on a GPU.
    """

    @property
    def n(self) -> int:
        """Outputs."""

    @property
    def k(self) -> int:
        """Inputs."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, with scales and other data."""

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``begin..end-1`` of the effective matrix: [end - begin, k], as a view where
        possible."""

    def gather(self, indices: Tensor) -> Tensor:
        """Return the rows ``indices`` [T] (int64), as for an embedding: [T, k]."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k] and ``bias`` [n]: [T, n] in x's dtype."""


def linear_by_rows(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` by torch, with a few rows of the weight expanded at a time."""
    y = x.new_empty(len(x), weight.n)
    size = max(1, PIECE_ELEMENTS // weight.k)
    for begin in range(0, weight.n, size):
        part = slice(begin, min(begin + size, weight.n))
        rows = weight.rows(part.start, part.stop)
        y[:, part] = F.linear(x, rows, None if bias is None else bias[part])
    return y


@dataclass(frozen=True, slots=True, eq=False)
class PlainWeight:
    """A weight as torch has it."""

    data: Tensor
    """[n, k]"""

    @property
    def n(self) -> int:
        return self.data.shape[0]

    @property
    def k(self) -> int:
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, begin: int, end: int) -> Tensor:
        return self.data[begin:end]

    def gather(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.data)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.data, bias)
