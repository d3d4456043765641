"""Weights as the compiled library takes them, in any of its forms."""

from __future__ import annotations

import ctypes

from torch import Tensor

from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.blocks import PackedBlocks
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.packed import PANEL, PackedWeight, pointer
from aioengine.kernels.cpu.quantized import QuantizedWeight

LibraryWeight = PackedWeight | QuantizedWeight | PackedBlocks


def matrix_of(weight: LibraryWeight, bias: Tensor | None) -> structs.Matrix:
    """Make the C structure, which points to the memory and does not keep it alive."""
    matrix = structs.Matrix(bias=pointer(bias), n=weight.n, k=weight.k, kind=structs.Kind.PACKED)
    if isinstance(weight, PackedBlocks):
        matrix.kind, matrix.part = structs.Kind.PARTS, ctypes.addressof(weight.struct)
        matrix.parts = len(weight.parts)
        return matrix
    matrix.packed, matrix.panel_bytes = weight.data.data_ptr(), weight.data.nbytes // (weight.n // PANEL)
    if isinstance(weight, QuantizedWeight):
        matrix.kind = structs.Kind.INT8
        matrix.scale, matrix.start = weight.scale.data_ptr(), weight.start_pointer
        matrix.rotation = weight.rotation
    if isinstance(weight, Int4Weight):
        matrix.kind, matrix.group = structs.Kind.INT4, weight.group
    return matrix
