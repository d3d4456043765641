"""Weights rearranged for the packed linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aioengine.kernels.cpu.shared_library import load, threads

PANEL = 16
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
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

    def rows(self, begin: int, end: int) -> Tensor:
        """Return a copy of rows ``begin..end-1``: [end - begin, k]."""
        out = torch.empty(end - begin, self.k, dtype=self.data.dtype)
        load().aio_unpack(is_bf16(self.data), self.data.data_ptr(), out.data_ptr(), begin, end, self.k)
        return out

    def gather(self, indices: Tensor) -> Tensor:
        """Return the rows ``indices`` [T] (int64): [T, k]."""
        out = torch.empty(len(indices), self.k, dtype=self.data.dtype)
        load().aio_gather(
            *(is_bf16(self.data), self.data.data_ptr(), indices.data_ptr(), out.data_ptr()),
            *(len(indices), self.k, threads()),
        )
        return out

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k]: [T, n]."""
        x = x.contiguous()
        y = torch.empty(len(x), self.n, dtype=x.dtype)
        load().aio_linear(
            *(is_bf16(x), x.data_ptr(), self.k, self.data.data_ptr(), pointer(bias)),
            *(y.data_ptr(), self.n, len(x), self.n, self.k, threads()),
        )
        return y

    def experts(self, x: Tensor, bias: Tensor | None, begins: Tensor) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k] that is sorted by expert, of which each row takes an expert's
        outputs: [T, n / experts].

        ``begins`` [experts + 1] (int32) are the first rows of the experts.
        """
        count = len(begins) - 1
        y = torch.empty(len(x), self.n // count, dtype=x.dtype)
        load().aio_linear_experts(
            *(is_bf16(x), x.data_ptr(), self.data.data_ptr(), pointer(bias), y.data_ptr()),
            *(begins.data_ptr(), count, self.n // count, self.k, threads()),
        )
        return y


def is_bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
