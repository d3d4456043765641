"""Linear layers: a weight in any form, and a bias; an MLP of two of them, and what is between these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from aioengine.kernels import Backend, Weight
from aioengine.model.spec import ModelSpec


@dataclass(slots=True)
class Linear:
    weight: Weight
    """[out, in]"""
    bias: Tensor | None

    def pack(self, pack: Callable[[Weight], Weight]) -> int:
        """Store the weight in another form; earlier views of it are no longer valid.

        Returns how many bytes it takes more than before; below zero if it takes fewer.
        """
        before = self.weight.nbytes
        self.weight = pack(self.weight)
        return self.weight.nbytes - before


@dataclass(slots=True)
class Mlp:
    """A gated MLP; gate and up are one linear."""

    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> dict[str, Linear]:
        return {"gate_up": self.gate_up, "down": self.down}


def activation(spec: ModelSpec, kernels: Backend) -> Callable[[Tensor], Tensor]:
    """Return the function from the outputs of gate and up [T, 2 * size] to [T, size]."""
    match spec.activation:
        case "silu":
            return kernels.silu_and_mul
        case "gelu_tanh":
            return kernels.gelu_and_mul
    return functools.partial(kernels.clamped_swiglu, alpha=spec.swiglu_alpha, limit=spec.swiglu_limit)
