"""A linear's weight in whatever form it is stored: plain, rearranged, or quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Weight(Protocol):
    """A matrix [n, k] that is used without knowing how it is stored.

    Whoever makes a weight chooses its form, so a form runs where its maker says: what is packed for the CPU
    library has no use on a GPU.
    """

    @property
    def n(self) -> int:
        """Outputs."""

    @property
    def k(self) -> int:
        """Inputs."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, scales and the like included."""

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin..end-1`` of the matrix that is in effect: [end - begin, k], a view where it can be."""

    def gather(self, indices: Tensor) -> Tensor:
        """The rows ``indices`` [T] (int64), as an embedding has them: [T, k]."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k] and ``bias`` [n]: [T, n] in x's dtype."""


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
