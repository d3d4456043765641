"""Weights as the compiled library multiplies them, and those that are only rearranged for it."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.cores import threads
from aioengine.kernels.cpu.shared_library import load

PANEL = 16
DTYPES = (torch.bfloat16, torch.float32)


class LibraryWeight(ABC):
    """A weight [n, k] in one of the library's forms, as panels of 16 rows."""

    __slots__ = ()

    @abstractmethod
    def matrix(self, bias: Tensor | None) -> structs.Matrix:
        """Make the C structure, which points to the memory and does not keep it alive."""

    @abstractmethod
    def gather(self, indices: Tensor) -> Tensor:
        """Return the rows ``indices`` [T] (int64) of the weight that is in effect: [T, k]."""

    def rows(self, begin: int, end: int) -> Tensor:
        """Return a copy of rows ``begin..end-1``: [end - begin, k]."""
        return self.gather(torch.arange(begin, end))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k]: [T, n]."""
        return self._product(x, bias, None)

    def experts(self, x: Tensor, bias: Tensor | None, begins: Tensor) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k] that is sorted by expert, of which each row takes an expert's
        outputs: [T, n / experts].

        ``begins`` [experts + 1] (int32) are the first rows of the experts.
        """
        return self._product(x, bias, begins)

    def _product(self, x: Tensor, bias: Tensor | None, begins: Tensor | None) -> Tensor:
        x, matrix = x.contiguous(), self.matrix(bias)
        experts = 0 if begins is None else len(begins) - 1
        y = torch.empty(len(x), matrix.n // max(experts, 1), dtype=x.dtype)
        load().aio_product(
            *(is_bf16(x), ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), len(x)),
            *(pointer(begins), experts, threads()),
        )
        return y


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight(LibraryWeight):
    """A weight [n, k] as panels of 16 rows; see ``src/linear.cpp``. Takes as much memory as before."""

    data: Tensor
    n: int
    k: int

    @staticmethod
    def fits(n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether a weight can be packed without padding."""
        return dtype in DTYPES and n % PANEL == 0 and k % (4 // dtype.itemsize) == 0

    @classmethod
    def pack(cls, weight: Tensor) -> PackedWeight:
        """Pack ``weight`` [n, k], contiguous, in place: its memory no longer holds the original order."""
        n, k = weight.shape
        assert cls.fits(n, k, weight.dtype) and weight.is_contiguous()
        data = weight.view(-1)
        load().aio_pack(is_bf16(weight), weight.data_ptr(), data.data_ptr(), n, k, threads())
        return cls(data, n, k)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights, activations and biases."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def matrix(self, bias: Tensor | None) -> structs.Matrix:
        return structs.Matrix(
            packed=self.data.data_ptr(),
            bias=pointer(bias),
            n=self.n,
            k=self.k,
            kind=structs.Kind.PACKED,
            panel_bytes=PANEL * self.k * self.dtype.itemsize,
        )

    def gather(self, indices: Tensor) -> Tensor:
        out = torch.empty(len(indices), self.k, dtype=self.dtype)
        load().aio_gather(
            *(is_bf16(self.data), self.data.data_ptr(), indices.data_ptr(), out.data_ptr()),
            *(len(indices), self.k, threads()),
        )
        return out


def is_bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
