"""Weights in four bits, made from any weight at load, for the packed linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight(QuantizedWeight):
    """A weight [n, k] as panels of 16 rows with four bits for each weight; see ``src/int4.cpp``.

    A group of 32 neighbouring inputs of a row has a step and a minimum ("low") of a byte each, and a row has
    a scale: 4.5 bits for a weight. ``pack`` tries steps and lows near those that span a group, and takes
    those with the smallest squared error.
    """

    PACK: ClassVar[str] = "aio_quantize_int4"
    UNPACK: ClassVar[str] = "aio_dequantize_int4"

    @staticmethod
    def packed_bytes(n: int, k: int) -> int:
        """Return the bytes of ``data``: half a byte for each weight, and two for each group of a row."""
        return n * (k // 2 + 2 * k // group_size(k))

    @property
    def group(self) -> int:
        """Inputs that share a step and a low."""
        return group_size(self.k)

    def matrix(self, bias: Tensor | None) -> structs.Matrix:
        matrix = QuantizedWeight.matrix(self, bias)
        matrix.kind, matrix.group = structs.Kind.INT4, self.group
        return matrix

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.group, self.rotation)


def group_size(k: int) -> int:
    """Return the number of inputs in a group, for ``k`` inputs, a multiple of 16."""
    return 32 if k % 32 == 0 else 16
