"""Weights in four bits, made from any weight at load, for the packed linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aioengine.kernels.cpu.packed import DTYPES, PANEL, is_bf16, pointer
from aioengine.kernels.cpu.quantized import rotation
from aioengine.kernels.cpu.shared_library import load, threads


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A weight [n, k] as panels of 16 rows with four bits for each weight; see ``src/int4.cpp``.

    A group of 32 neighbouring inputs of a row has a step and a minimum ("low") of a byte each, and a row has
    a scale: 4.5 bits for a weight. With ``int8_activations`` activations become int8, with a scale for each
    token.
    """

    data: Tensor
    """[n / 16 * panel_bytes] uint8"""
    scale: Tensor
    """[n] float32"""
    start: Tensor
    """[n] int32; used with ``int8_activations``."""
    int8_activations: bool
    n: int
    k: int
    rotation: int
    """Size of the blocks that are multiplied by a Hadamard matrix; 0: none are."""
    dtype: torch.dtype
    """dtype of activations and biases."""

    @staticmethod
    def fits(n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether a weight can be packed without padding."""
        return dtype in DTYPES and n % PANEL == 0 and k % PANEL == 0

    @staticmethod
    def packed_bytes(n: int, k: int) -> int:
        """Return the bytes of ``data``: half a byte for each weight, and two for each group of a row."""
        return n * (k // 2 + 2 * k // group_size(k))

    @classmethod
    def pack(cls, weight: Tensor, memory: Tensor, *, int8_activations: bool) -> Int4Weight:
        """Quantizes ``weight`` [n, k], contiguous, into ``memory`` [packed_bytes(n, k)] (uint8).

        Tries steps and lows near those that span a group, and takes those with the smallest squared error.
        """
        n, k = weight.shape
        assert (
            cls.fits(n, k, weight.dtype)
            and weight.is_contiguous()
            and memory.nbytes == cls.packed_bytes(n, k)
        )
        packed = cls(
            *(memory, torch.empty(n), torch.zeros(n, dtype=torch.int32), int8_activations, n, k),
            *(rotation(k) if int8_activations else 0, weight.dtype),
        )
        load().aio_quantize_int4(
            *(is_bf16(weight), weight.data_ptr(), memory.data_ptr(), packed.scale.data_ptr()),
            *(packed.start_pointer, n, k, packed.group, packed.rotation, threads()),
        )
        return packed

    @property
    def group(self) -> int:
        """Inputs that share a step and a low."""
        return group_size(self.k)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.start.nbytes

    @property
    def start_pointer(self) -> int | None:
        """None leaves the activations as they are."""
        return self.start.data_ptr() if self.int8_activations else None

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin..end-1`` of the weight that is in effect: [end - begin, k]."""
        return self.gather(torch.arange(begin, end))

    def gather(self, indices: Tensor) -> Tensor:
        """Return the rows ``indices`` [T] (int64): [T, k]."""
        out = torch.empty(len(indices), self.k, dtype=self.dtype)
        load().aio_dequantize_int4(
            *(is_bf16(out), self.data.data_ptr(), self.scale.data_ptr(), indices.data_ptr(), out.data_ptr()),
            *(len(indices), self.k, self.group, self.rotation, threads()),
        )
        return out

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k]: [T, n]."""
        x = x.contiguous()
        y = torch.empty(len(x), self.n, dtype=x.dtype)
        load().aio_linear_int4(
            *(is_bf16(x), x.data_ptr(), self.k, self.data.data_ptr(), self.scale.data_ptr()),
            *(self.start_pointer, self.group, self.rotation, pointer(bias), y.data_ptr(), self.n),
            *(len(x), self.n, self.k, None, threads()),
        )
        return y


def group_size(k: int) -> int:
    """Return the number of inputs in a group, for ``k`` inputs, a multiple of 16."""
    return 32 if k % 32 == 0 else 16
