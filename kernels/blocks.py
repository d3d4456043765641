"""Weights in the form of a quantized checkpoint, on any device, and several of them as one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aioengine.kernels.portable.dequantize import GGUF_FORMATS, codes, dequantize, scales
from aioengine.kernels.weight import Weight, linear_by_rows

ALIGNMENT = 16
"""Bytes that GPU kernels load at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight:
    """A weight [n, k] as rows of blocks, or of codes with scales for groups of inputs.

    With codes, ``w = scale * (code - zero)``, in float32, rounded to ``dtype`` once.
    """

    format: str
    """Name of a format in :mod:`aioengine.kernels.portable.dequantize`."""
    data: Tensor
    """[n, row bytes] uint8"""
    k: int
    dtype: torch.dtype
    """dtype of activations and biases."""
    scale: Tensor | None = None
    """[n, groups] float32, or exponents (uint8); None: the scales are in the blocks."""
    zero: Tensor | None = None
    """[n, groups] int16; None: ``middle`` everywhere."""
    group_of: Tensor | None = None
    """[k] int32: the group of each input; None: each ``group`` inputs are one."""
    group: int = 0
    middle: int = 0

    @property
    def n(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that it consists of, by their names here."""
        all_of_them = {"data": self.data, "scale": self.scale, "zero": self.zero, "group_of": self.group_of}
        return {name: tensor for name, tensor in all_of_them.items() if tensor is not None}

    def rows(self, begin: int, end: int) -> Tensor:
        return self._expand(slice(begin, end))

    def gather(self, indices: Tensor) -> Tensor:
        return self._expand(indices)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear_by_rows(x, self, bias)

    def _expand(self, rows: slice | Tensor) -> Tensor:
        data = self.data[rows]
        if self.format in GGUF_FORMATS:
            return dequantize(self.format, data).to(self.dtype)
        assert self.scale is not None
        group = self.group_of
        if group is None:
            group = torch.arange(self.k, device=data.device) // self.group
        values = codes(self.format, data)
        zero = self.middle if self.zero is None else self.zero[rows].float()[:, group]
        return ((values - zero) * scales(self.scale[rows])[:, group]).to(self.dtype)


@dataclass(frozen=True, eq=False)
class StackedWeight:
    """Several weights with the same inputs, as one weight whose outputs follow each other."""

    parts: Sequence[Weight]

    @cached_property
    def addresses(self) -> Tensor | None:
        """[parts, 3] (int64) where each part has its data, scale and zero (0: none), on their device; None
        unless all parts are codes in groups of neighbours, of one shape, stored alike, and begin at multiples
        of ``ALIGNMENT`` bytes: kernels take that for granted, and only here it can be seen."""
        parts = [part for part in self.parts if isinstance(part, BlockWeight)]
        kinds = {(p.format, p.n, p.k, p.group, p.middle, p.zero is None, p.scale is None) for p in parts}
        ordered = any(part.group_of is not None or part.scale is None for part in parts)
        if len(parts) < len(self.parts) or len(kinds) != 1 or ordered:
            return None
        tensors = ((part.data, part.scale, part.zero) for part in parts)
        found = [[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in tensors]
        if any(data % ALIGNMENT for data, _, _ in found):
            return None
        return torch.tensor(found, device=parts[0].data.device)

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rows(self, begin: int, end: int) -> Tensor:
        found, first = [], 0
        for part in self.parts:
            low, high = max(begin - first, 0), min(end - first, part.n)
            if low < high:
                found.append(part.rows(low, high))
            first += part.n
        return found[0] if len(found) == 1 else torch.cat(found)

    def gather(self, indices: Tensor) -> Tensor:
        return torch.cat([self.rows(i, i + 1) for i in indices.tolist()])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        sizes = [part.n for part in self.parts]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        return torch.cat([part.linear(x, b) for part, b in zip(self.parts, biases, strict=True)], 1)
