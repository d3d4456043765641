"""Weights of quantized checkpoints for the compiled library, in the bytes that the checkpoint has."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.cores import threads
from aioengine.kernels.cpu.packed import DTYPES, PANEL, LibraryWeight, PackedWeight, is_bf16, pointer
from aioengine.kernels.cpu.shared_library import load
from aioengine.kernels.cpu.structs import Part
from aioengine.kernels.portable.dequantize import LAYOUTS

_FORMATS = ("plain", *LAYOUTS)
"""Formats in which a part of a weight is stored, in the library's order."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedBlocks(LibraryWeight):
    """A weight [n, k] in parts of 16 m rows each, which may be stored differently; see ``src/blocks.h``.

    Its outputs are the same bits as those of a :class:`PackedWeight` of the expanded weight.
    """

    parts: Sequence[BlockWeight | PackedWeight]
    struct: ctypes.Array[Part]
    """The parts, as the library reads them."""
    dtype: torch.dtype

    @staticmethod
    def fits(n: int, k: int, format: str, dtype: torch.dtype) -> bool:
        """Whether a part of this format and shape can be packed."""
        return dtype in DTYPES and n % PANEL == 0 and k % LAYOUTS[format][0] == 0

    @classmethod
    def pack(cls, parts: Sequence[BlockWeight | PackedWeight]) -> PackedBlocks:
        """Pack parts of one dtype in place: their memory no longer holds the original form."""
        packed = [_turn(part) if isinstance(part, BlockWeight) else part for part in parts]
        dtype = next(part.dtype for part in parts if isinstance(part, BlockWeight))
        return cls(packed, (Part * len(packed))(*map(_struct, packed)), dtype)

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def matrix(self, bias: Tensor | None) -> structs.Matrix:
        return structs.Matrix(
            bias=pointer(bias),
            n=self.n,
            k=self.k,
            kind=structs.Kind.PARTS,
            part=ctypes.addressof(self.struct),
            parts=len(self.parts),
        )

    def gather(self, indices: Tensor) -> Tensor:
        out = torch.empty(len(indices), self.k, dtype=self.dtype)
        load().aio_expand_rows(
            *(is_bf16(out), self.struct, indices.data_ptr(), out.data_ptr(), len(indices), self.k, threads())
        )
        return out


def _turn(weight: BlockWeight) -> BlockWeight:
    """Rearrange ``weight`` into panels; each tensor keeps its shape and its memory."""
    size, *fields = LAYOUTS[weight.format]
    assert PackedBlocks.fits(weight.n, weight.k, weight.format, weight.dtype) and weight.data.is_contiguous()
    load().aio_turn_blocks(weight.data.data_ptr(), weight.n, weight.k // size, *fields, threads())
    for beside in (weight.scale, weight.zero):
        if beside is not None:
            panels = beside.view(-1, PANEL, beside.shape[1])
            beside.copy_(panels.transpose(1, 2).reshape(beside.shape))
    return weight


def _struct(part: BlockWeight | PackedWeight) -> Part:
    if isinstance(part, PackedWeight):
        return Part(format=0, data=part.data.data_ptr(), panels=part.n // PANEL)
    return Part(
        format=_FORMATS.index(part.format),
        data=part.data.data_ptr(),
        panels=part.n // PANEL,
        scale=pointer(part.scale),
        zero=pointer(part.zero),
        group_of=pointer(part.group_of),
        group=part.group,
        middle=part.middle,
    )
