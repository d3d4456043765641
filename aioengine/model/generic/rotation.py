"""Rotations of queries and keys, put off until the attention stores them, where they take one operation.

The functions that attention modules rotate by are recognised by what they compute. Each module gets a forward
of its own whose function only remembers the rotation; the attention must then get the same queries and keys.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import Rotation
from aioengine.model.generic.step import Holder, Step, Turn

Rotate = Callable[..., tuple[Tensor, Tensor]]


class Pairing(NamedTuple):
    """How a function rotates."""

    neighbours: bool
    """Whether dimension 2 i is paired with 2 i + 1. Otherwise i is paired with i + half."""
    alternates: bool
    """Whether its cosines are each given twice in a row. Otherwise all are given twice."""
    partial: bool
    """Whether it takes fewer cosines than dimensions, and leaves the others as they are."""


class PutOff:
    """Takes the place of a function that rotates."""

    def __init__(self, own: Rotate, pairing: Pairing, holder: Holder) -> None:
        self._own = own
        self._pairing = pairing
        self._holder = holder

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        own = functools.partial(self._own, q, k, cos, sin, *more, **named)
        step = self._holder.step
        if step is None or step.plan is None or more or named or step.turn is not None:
            return own()
        fits = len(q) == 1 and cos.shape[1:2] == q.shape[2:3]
        rotation = self._rotation(step, q.shape[-1], cos, sin) if fits else None
        if rotation is None:
            return own()
        step.turn = Turn(q, k, rotation, own, (cos, sin), self._rotation)
        return q, k

    def _rotation(self, step: Step, d: int, cos: Tensor, sin: Tensor) -> Rotation | None:
        """Return the backend's form of it, for heads of size ``d``; None if it has none."""
        key = "rotation", d, id(cos), id(sin)
        if key not in step.made:
            step.made[key] = cos, sin, self._convert(d, cos, sin)
        found: Rotation | None = step.made[key][2]
        return found

    def _convert(self, d: int, cos: Tensor, sin: Tensor) -> Rotation | None:
        neighbours, alternates, partial = self._pairing
        width = cos.shape[-1]
        if cos.dim() != 3 or len(cos) != 1 or sin.shape != cos.shape:
            return None
        if not (width == d or (partial and width < d)) or width % 2:
            return None
        halves = []
        for x in (cos[0].float(), sin[0].float()):
            first, second = (x[:, ::2], x[:, 1::2]) if alternates else x.chunk(2, dim=-1)
            if not torch.equal(first, second):
                return None
            halves.append(first[:, None].contiguous())
        return Rotation(halves[0], halves[1], neighbours)


class PutOffRotations:
    """Attention modules that leave the rotation to the engine's attention; :meth:`undo` takes it back."""

    def __init__(self, modules: dict[str, Any], holder: Holder) -> None:
        self._changed: list[Any] = []
        made: dict[Any, Callable[..., Any] | None] = {}
        for module in modules.values():
            if not hasattr(module, "layer_idx") or "forward" in vars(module):
                continue
            own = inspect.unwrap(type(module).forward)
            if own not in made:
                made[own] = _putting_off(own, holder)
            forward = made[own]
            if forward is not None:
                module.forward = functools.partial(forward, weakref.proxy(module))
                self._changed.append(module)

    def __bool__(self) -> bool:
        return bool(self._changed)

    def undo(self) -> None:
        """Let the modules rotate by themselves."""
        for module in self._changed:
            del module.forward
        self._changed.clear()


def _putting_off(forward: Any, holder: Holder) -> Callable[..., Any] | None:
    """Return a copy of a module's forward whose functions that rotate, which it finds by global names, are
    put off; None if there are none."""
    replaced = {}
    for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
        function = forward.__globals__.get(name)
        if isinstance(function, types.FunctionType) and (pairing := pairing_of(function)) is not None:
            replaced[name] = PutOff(function, pairing, holder)
    return _with_globals(forward, replaced) if replaced else None


def _with_globals(function: Any, replaced: dict[str, Any]) -> Callable[..., Any]:
    """Return a copy of a function for which some global names mean something else."""
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def pairing_of(function: Callable[..., Any]) -> Pairing | None:
    """Recognise a function ``(q, k, cos, sin, ...)`` that rotates as the backends do."""
    if list(inspect.signature(function).parameters)[2:4] != ["cos", "sin"]:
        return None
    for alternates in (False, True):
        for neighbours in (False, True):
            if _rotates(function, 8, neighbours, alternates):
                return Pairing(neighbours, alternates, _rotates(function, 4, neighbours, alternates))
    return None


def _rotates(function: Callable[..., Any], width: int, neighbours: bool, alternates: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (3, 2))
    halves = [torch.randn(1, 5, width // 2, generator=generator) for _ in range(2)]
    cos, sin = (x.repeat_interleave(2, dim=-1) if alternates else torch.cat([x, x], dim=-1) for x in halves)
    try:
        found = function(q, k, cos, sin)
    except Exception:  # whatever it makes of inputs that it was not made for
        return False
    expected = [_rotated(x, halves[0], halves[1], neighbours) for x in (q, k)]
    return (
        isinstance(found, tuple)
        and len(found) == 2
        and all(
            isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
            for a, b in zip(found, expected, strict=True)
        )
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    """Rotate ``x`` [1, heads, T, d] by ``cos`` and ``sin`` [1, T, half]."""
    half = cos.shape[-1]
    out = x.clone()
    one = slice(0, 2 * half, 2) if neighbours else slice(0, half)
    two = slice(1, 2 * half, 2) if neighbours else slice(half, 2 * half)
    a, b, c, s = x[..., one], x[..., two], cos[:, None], sin[:, None]
    out[..., one] = a * c - b * s
    out[..., two] = b * c + a * s
    return out
