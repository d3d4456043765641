"""Linear layers: a weight in any form, and a bias; and what is between those of an MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aioengine.kernels import Backend, PlainWeight, Weight
from aioengine.kernels.weight import PIECE_ELEMENTS
from aioengine.model.spec import ModelSpec


@dataclass(slots=True)
class Linear:
    weight: Weight
    """[out, in]"""
    bias: Tensor | None

    def pack(self, pack: Callable[[Weight], Weight]) -> int:
        """Store the weight in another form; earlier views of it are no longer valid.

        Returns how many bytes it takes more than before; below zero if it takes fewer.
        """
        before = self.weight.nbytes
        self.weight = pack(self.weight)
        return self.weight.nbytes - before


def activation(spec: ModelSpec, kernels: Backend) -> Callable[[Tensor], Tensor]:
    """Return the function from the outputs of gate and up [T, 2 * size] to [T, size]."""
    match spec.activation:
        case "silu":
            return kernels.silu_and_mul
        case "gelu_tanh":
            return kernels.gelu_and_mul
    return functools.partial(kernels.clamped_swiglu, alpha=spec.swiglu_alpha, limit=spec.swiglu_limit)


@dataclass(frozen=True, slots=True, eq=False)
class WeightRows:
    """Rows of a weight, at least one, as a matrix [out, in]; ``turned``: these are its columns, as an
    embedding's are."""

    weight: Weight
    begin: int
    end: int
    turned: bool = False

    @classmethod
    def of(cls, matrix: Tensor) -> WeightRows:
        """Return all of a matrix that is stored as it is."""
        return cls(PlainWeight(matrix), 0, len(matrix))

    def whole(self) -> Tensor:
        """Return the matrix; if it is not plain, expanded on the CPU."""
        pieces = [piece if self.is_plain else piece.cpu() for _, piece in self.pieces()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=int(self.turned))

    @property
    def is_plain(self) -> bool:
        """Whether it is there as it is, and need not be expanded."""
        return isinstance(self.weight, PlainWeight)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the matrix in pieces of whole rows (``turned``: columns), each with the number of the first;
        a weight that is not plain is expanded piece by piece."""
        size = self.end - self.begin if self.is_plain else PIECE_ELEMENTS // self.weight.k
        for begin in range(self.begin, self.end, max(1, size)):
            rows = self.weight.rows(begin, min(begin + size, self.end))
            yield begin - self.begin, rows.T if self.turned else rows
