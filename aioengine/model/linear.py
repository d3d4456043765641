"""A linear layer's weights, plain or packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from aioengine.kernels.cpu.quantized import Packed


@dataclass(slots=True)
class Linear:
    weight: Tensor | Packed
    """[out, in]"""
    bias: Tensor | None

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin..end-1`` of the weight: a view, or a copy if it is packed."""
        if isinstance(self.weight, Tensor):
            return self.weight[begin:end]
        return self.weight.rows(begin, end)

    def pack(self, pack: Callable[[Tensor], Packed]) -> int:
        """Rearranges the weight for the CPU library; what was a view of it no longer is.

        Returns how many bytes it takes more than before; below zero if it takes fewer.
        """
        assert isinstance(self.weight, Tensor)
        before = self.weight.nbytes
        self.weight = pack(self.weight)
        return self.weight.nbytes - before
