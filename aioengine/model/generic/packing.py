"""Linears of a model on the CPU library: their weights are rearranged for it, one after the other."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.model.generic.linears import AdaptedForward


class PackedForward:
    """Takes the place of a linear's ``forward``, and of what it does with its weight."""

    def __init__(self, module: Any) -> None:
        self.plain = isinstance(module, torch.nn.Linear)
        """Whether the module has its weight as [out, in]; else it is transposed."""
        weight = module.weight.detach()
        own = weight.clone() if self.plain else weight.T.contiguous()
        self.weight = PackedWeight.pack(own)
        self.bias: Tensor | None = None if module.bias is None else module.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        y = self.weight.linear(x.reshape(-1, x.shape[-1]), self.bias)
        return y.view(*x.shape[:-1], -1)

    def unpacked(self) -> Tensor:
        """The weight as the module has it."""
        whole = self.weight.rows(0, self.weight.n)
        return whole if self.plain else whole.T.contiguous()


class PackedLinears:
    """What has been packed of a model, and may be undone."""

    def __init__(self, modules: dict[str, Any], names: list[str]) -> None:
        """Packs those of ``names`` that can be: usual linears with a weight of their own."""
        shared = _shared(modules)
        self._undo: list[tuple[Any, PackedForward, Callable[..., Tensor]]] = []
        self.by_name: dict[str, PackedForward] = {}
        for name in names:
            module = modules[name]
            if type(module).forward not in _usual() or id(module.weight) in shared:
                continue
            n, k = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.T.shape
            if not PackedWeight.fits(n, k, module.weight.dtype):
                continue
            packed = self.by_name[name] = PackedForward(module)
            self._undo.append((module, packed, _replace(module, packed)))
            # Whoever looks at the weight sees its type; what it holds is of use only to the library.
            module.weight.data = packed.weight.data.view(module.weight.shape)

    def undo(self) -> None:
        """Has all modules compute by themselves again."""
        for module, packed, forward in self._undo:
            _replace(module, forward)
            module.weight.data = packed.unpacked()
        self._undo.clear()
        self.by_name.clear()


def _replace(module: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sets what computes a linear without adapters; returns what did so far."""
    now = module.forward
    if isinstance(now, AdaptedForward):
        before, now.inner = now.inner, forward
        return before
    module.forward = forward
    return functools.partial(type(module).forward, weakref.proxy(module))


def _usual() -> tuple[Any, ...]:
    from transformers.pytorch_utils import Conv1D

    return torch.nn.Linear.forward, Conv1D.forward


def _shared(modules: dict[str, Any]) -> set[int]:
    """The ids of parameters that several modules have."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
