"""Small modules that are recognised by what they compute, and then computed by one operation each.

Names do not matter: a copy in float32, with random weights, must give what the operation gives.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels import Backend, Norm
from aioengine.kernels.cpu.adapted import gated_mlp
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.model.generic.packing import Member, PackedLinear
from aioengine.model.generic.step import Holder

Forward = Callable[..., Tensor]
Activation = Literal["silu", "gelu_tanh"]

_USUAL_EPS = (1e-5, 1e-6, 1e-8)
_EXACT = 1e-4
"""Largest difference in float32, relative to the largest value of a row."""
_ROUNDED = 0.02
"""The same where activations are rounded to int8, in which the last bit of a value may make a difference."""
_ROWS = 48


class Recognised:
    """Modules whose ``forward`` was replaced; :meth:`undo` restores it."""

    def __init__(
        self, modules: dict[str, Any], packed: dict[str, Member], holder: Holder, kernels: Backend
    ) -> None:
        self._changed: list[Any] = []
        linears: dict[str, list[Member]] = {}
        for name, member in packed.items():
            linears.setdefault(name.rpartition(".")[0], []).append(member)
        for name, module in modules.items():
            if "forward" in vars(module):
                continue
            forward = _norm(module, holder, kernels) or _activation(module)
            if forward is None and name in linears:
                forward = _gated(module, linears[name], holder)
            if forward is not None:
                module.forward = forward
                self._changed.append(module)

    def undo(self) -> None:
        """Let all modules compute as before."""
        for module in self._changed:
            del module.forward
        self._changed.clear()


def own_forward(module: Any) -> Forward:
    """Return the forward of its class, without a reference to the module, which would make a cycle. (Nor by a
    proxy, which has another type.)"""
    forward, found = type(module).forward, weakref.ref(module)

    def own(*arguments: Any, **named: Any) -> Any:
        return forward(found(), *arguments, **named)

    return own


class NormForward:
    """Computes a root-mean-square norm by the backend's operation."""

    def __init__(self, module: Any, norm: Norm, holder: Holder, kernels: Backend) -> None:
        self._own = own_forward(module)
        self._norm = norm
        self._size = len(norm.weight)
        self._holder, self._kernels = holder, kernels

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self._norm.weight.dtype:
            return self._own(x)
        if self._holder.seen is not None:
            self._holder.seen.append(self._norm)
        rows = x.reshape(-1, self._size).contiguous()
        return self._kernels.add_rms_norm(rows, None, self._norm).view(x.shape)


def _norm(module: Any, holder: Holder, kernels: Backend) -> Forward | None:
    """Return what computes the module if it is a root-mean-square norm with a weight."""
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].dim() != 1 or _has_children(module) or list(module.buffers()):
        return None
    weight = parameters[0].detach()
    generator = torch.Generator().manual_seed(0)
    # Small ones show which epsilon is added, large ones whether something is cut off.
    scales = torch.logspace(-5, 4, _ROWS)[:, None]
    x = scales * torch.randn(_ROWS, len(weight), generator=generator)
    outliers = torch.arange(0, _ROWS, 3)  # rows in which one value is far larger than all others
    x[outliers, outliers % len(weight)] *= 1e3
    random = torch.randn(len(weight), generator=generator)
    most = torch.finfo(weight.dtype).max
    rounded = x.clamp(-most, most).to(weight.dtype)
    try:
        expected = _in_float32(module, random)(x)
    except Exception:
        return None
    own = [value for value in vars(module).values() if isinstance(value, float)]
    for eps in (*own, *_USUAL_EPS):
        for offset in (0.0, 1.0):
            if not equal(kernels.add_rms_norm(x, None, Norm(random, eps, offset)), expected):
                continue
            for rounding in (None, 0.0) if offset == 0 else (offset,):
                norm = Norm(weight, eps, rounding)
                if _same_bits(kernels.add_rms_norm(rounded, None, norm), module(rounded)):
                    return NormForward(module, norm, holder, kernels)
    return None


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether almost all elements are equal, and the others are neighbours."""
    if found.dtype != expected.dtype:
        return False
    if found.dtype == torch.float32:
        return equal(found, expected)
    near = (found.float() - expected.float()).abs() <= expected.float().abs() * torch.finfo(found.dtype).eps
    return bool(near.all()) and float((found == expected).float().mean()) > 0.99


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its approximation by tanh."""
    return F.gelu(x, approximate="tanh")


def _activation(module: Any) -> Forward | None:
    """Return what computes the module if it is a formula for GELU."""
    if type(module).__module__.startswith("torch.") or _function_of(module) is not gelu_tanh:
        return None
    return gelu_tanh


def _function_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """Return which function of each element a module without parameters computes, if it is known."""
    if _has_children(module) or list(module.parameters()) or list(module.buffers()):
        return None
    x = torch.cat([torch.linspace(-12, 12, 997), torch.tensor([-1e4, -1e2, 1e2, 1e4])])
    try:
        found = module(x)
    except Exception:
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    for function in (F.silu, gelu_tanh):
        if torch.allclose(found, function(x), rtol=1e-6, atol=1e-5):
            return function
    return None


class GatedForward:
    """Computes a gated MLP in one call."""

    def __init__(
        self, module: Any, gate_up: PackedLinear, down: PackedLinear, activation: Activation, holder: Holder
    ) -> None:
        self._own = own_forward(module)
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self._holder = holder

    def __call__(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        gate_up, down = self.gate_up, self.down
        if more or named or gate_up.is_plain or down.is_plain:
            return self._own(x, *more, **named)
        batch = None if self._holder.step is None else self._holder.step.lora
        assert gate_up.adapted is not None and down.adapted is not None
        if self._holder.seen is not None:
            self._holder.seen.append(self)
        y = gated_mlp(gate_up.adapted, down.adapted, self.activation, gate_up.rows(x), batch)
        return y.view(*x.shape[:-1], y.shape[-1])


class _Parts(NamedTuple):
    gate_up: PackedLinear
    down: PackedLinear


def _gated(module: Any, linears: Sequence[Member], holder: Holder) -> Forward | None:
    """Return what computes the module if it is ``down(act(gate(x)) * up(x))``."""
    parts = _parts(linears)
    functions = {f for child in module.children() if (f := _function_of(child)) is not None}
    if parts is None or len(functions) != 1:
        return None
    activation: Activation = "silu" if functions == {F.silu} else "gelu_tanh"
    forward = GatedForward(module, parts.gate_up, parts.down, activation, holder)
    weight = parts.gate_up.weight
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 4, _ROWS)[:, None]  # large ones show whether something is cut off
    x = (scales * torch.randn(1, _ROWS, weight.k, generator=generator)).to(weight.dtype)
    try:
        expected = type(module).forward(module, x)
    except Exception:
        return None
    tolerance = tolerance_of(x.dtype, isinstance(weight, QuantizedWeight) and weight.int8_activations)
    found = forward(x)
    return forward if equal(found, expected, tolerance) and equal_in_size(found, expected) else None


def equal_in_size(found: Tensor, expected: Tensor) -> bool:
    """Whether neither is a multiple of the other: rounding averages out over a row, a factor does not."""
    found, expected = found.double(), expected.double()
    ratio = (found * expected).sum(-1) / (expected * expected).sum(-1).clamp(min=1e-30)
    return bool(((ratio - 1).abs() < 0.005).all())


def _parts(linears: Sequence[Member]) -> _Parts | None:
    """Return the product that makes gate and up, one below the other, and the one that reads what comes of
    them."""
    products = list(dict.fromkeys(member.packed for member in linears))
    if len(products) != 2 or any(product.adapted is None for product in products):
        return None
    for gate_up, down in (products, reversed(products)):
        sizes = {end - begin for begin, end in gate_up.columns}
        halves = len(sizes) == 1 and len(gate_up.columns) <= 2
        if halves and gate_up.weight.n == 2 * down.weight.k and len(down.columns) == 1:
            return _Parts(gate_up, down)
    return None


def _in_float32(module: Any, weight: Tensor) -> Any:
    made = copy.deepcopy(module).float()
    next(made.parameters()).data = weight
    return made


def _has_children(module: Any) -> bool:
    return next(iter(module.children()), None) is not None


def tolerance_of(dtype: torch.dtype, rounds: bool) -> float:
    """Return the largest difference that rounding may make; ``rounds``: activations are rounded to int8."""
    tolerance = _EXACT if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    return max(tolerance, _ROUNDED) if rounds else tolerance


def equal(found: Any, expected: Any, tolerance: float = _EXACT) -> bool:
    """Whether rows differ by at most ``tolerance`` times their largest values."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    error = (found - expected).abs().amax(-1)
    return bool((error <= tolerance * expected.abs().amax(-1).clamp(min=1e-12)).all())
