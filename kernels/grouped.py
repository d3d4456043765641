"""Weights of 4 or 8 bits in groups of neighbouring inputs, as quantized checkpoints have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight:
    """A weight [n, k] whose inputs come in G groups of k / G neighbours, each with a scale and an offset.

    With g the group of place j, that is j * G // k, the weight in effect is::

        W[i, order[j]] = scale[i, g] * code[i, j] + offset[i, g]

    Codes are unsigned. A checkpoint's zero point z is ``offset = -scale * z``, its minimum m ``offset = m``;
    signed codes are stored with 8 (or 128) added, and ``offset`` takes that away again.

    This is the form that everything else is measured by, in plain torch and on any device.
    :class:`aioengine.kernels.cpu.grouped.PackedGroupedWeight` is the compiled one.
    """

    codes: Tensor
    """uint8, row by row: [n, k] with 8 bits; [n, k / 2] with 4, place 2j in the low half of byte j."""
    scale: Tensor
    """[n, G] float16 or float32."""
    offset: Tensor
    """[n, G] in scale's dtype."""
    bits: Literal[4, 8]
    dtype: torch.dtype
    """dtype of the activations, and of rows that are returned."""
    order: Tensor | None = None
    """[k] int64, a permutation: which input is at each place; None: each at its own. Of checkpoints that
    sorted the inputs by how much they matter before they made groups of them ("act-order", "desc_act")."""

    def __post_init__(self) -> None:
        groups = self.scale.shape[1]
        assert self.codes.dtype == torch.uint8 and self.scale.shape == self.offset.shape == (self.n, groups)
        assert self.k % groups == 0 and self.scale.dtype == self.offset.dtype

    @staticmethod
    def halves(codes: Tensor) -> Tensor:
        """Codes of 4 bits, a byte each, as ``codes`` keeps them: uint8 [n, k] -> [n, k / 2]; k is even."""
        return codes[:, 0::2] | codes[:, 1::2] << 4

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        order = 0 if self.order is None else self.order.nbytes
        return self.codes.nbytes + self.scale.nbytes + self.offset.nbytes + order

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin..end-1`` of the weight that is in effect: [end - begin, k]."""
        return self._rows(slice(begin, end)).to(self.dtype)

    def gather(self, indices: Tensor) -> Tensor:
        """The rows ``indices`` [T] (int64): [T, k]."""
        return self._rows(indices).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` for ``x`` [T, k]: [T, n]. The weight is made for it, in x's dtype."""
        return F.linear(x, self.rows(0, self.n).to(x.dtype), bias)

    def _rows(self, which: slice | Tensor) -> Tensor:
        """[T, k] float32."""
        codes, scale, offset = (part[which] for part in (self.codes, self.scale, self.offset))
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1)
        grouped = codes.reshape(*scale.shape, -1).float()
        found = grouped * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)
        found = found.flatten(1)
        if self.order is None:
            return found
        placed = torch.empty_like(found)
        placed[:, self.order] = found
        return placed
