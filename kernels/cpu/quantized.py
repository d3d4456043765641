"""Weights as int8, with a scale for each output, for the packed linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.cores import threads
from aioengine.kernels.cpu.packed import DTYPES, PANEL, LibraryWeight, is_bf16, pointer
from aioengine.kernels.cpu.shared_library import load

BLOCK = 64
"""Number of inputs that are rotated together where activations are int8, too; fewer if it does not divide
their number."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight(LibraryWeight):
    """A weight [n, k] as int8 panels of 16 rows; see ``src/quantized.cpp``.

    With ``int8_activations`` activations become int8 as well, with a scale for each token.
    """

    PACK: ClassVar[str] = "aio_quantize"
    UNPACK: ClassVar[str] = "aio_dequantize"
    """Names of the library's functions for this form."""

    data: Tensor
    """[packed_bytes(n, k)] uint8"""
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
        """Return the bytes of ``data``."""
        return n * k

    @classmethod
    def pack(cls, weight: Tensor, memory: Tensor, *, int8_activations: bool) -> Self:
        """Quantize ``weight`` [n, k], contiguous, into ``memory`` [packed_bytes(n, k)] (uint8)."""
        n, k = weight.shape
        assert cls.fits(n, k, weight.dtype) and weight.is_contiguous()
        assert memory.nbytes == cls.packed_bytes(n, k)
        packed = cls(
            *(memory, torch.empty(n), torch.zeros(n, dtype=torch.int32), int8_activations, n, k),
            *(rotation(k) if int8_activations else 0, weight.dtype),
        )
        getattr(load(), cls.PACK)(
            *(is_bf16(weight), weight.data_ptr(), memory.data_ptr(), packed.scale.data_ptr()),
            *(packed.start_pointer, n, k, *packed.blocks, threads()),
        )
        return packed

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of the blocks into which a row is cut, as the library's functions take them."""
        return (self.rotation,)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.start.nbytes

    @property
    def start_pointer(self) -> int | None:
        """None leaves the activations as they are."""
        return self.start.data_ptr() if self.int8_activations else None

    def matrix(self, bias: Tensor | None) -> structs.Matrix:
        return structs.Matrix(
            packed=self.data.data_ptr(),
            bias=pointer(bias),
            n=self.n,
            k=self.k,
            kind=structs.Kind.INT8,
            panel_bytes=self.data.nbytes // (self.n // PANEL),
            scale=self.scale.data_ptr(),
            start=self.start_pointer,
            rotation=self.rotation,
        )

    def gather(self, indices: Tensor) -> Tensor:
        out = torch.empty(len(indices), self.k, dtype=self.dtype)
        getattr(load(), self.UNPACK)(
            *(is_bf16(out), self.data.data_ptr(), self.scale.data_ptr(), indices.data_ptr(), out.data_ptr()),
            *(len(indices), self.k, *self.blocks, threads()),
        )
        return out


def rotation(k: int) -> int:
    """Return the size of the blocks in which ``k`` inputs, a multiple of 16, are rotated."""
    return min(BLOCK, k & -k)
