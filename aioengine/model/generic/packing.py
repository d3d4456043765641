"""Linears of a model on the CPU library: their weights are rearranged for it, one after the other.

Those that read the same input are one product, for the base model and for its adapters: the first of them
that is called makes the outputs of all.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import Backend
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.model.generic.linears import AdaptedForward, base_weight
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.generic.step import Holder, Step


class Outputs(NamedTuple):
    """Outputs that the first member of a group has computed for the others."""

    x: Tensor
    step: Step | None
    y: Tensor
    """[T, all outputs]"""


class PackedLinear:
    """One linear, or several that read the same input, with the adapters on them."""

    def __init__(
        self, modules: Sequence[Any], hooks: Sequence[AdaptedForward | None], holder: Holder, kernels: Backend
    ) -> None:
        both = [base_weight(module) for module in modules]
        weights = [weight for weight, _ in both]
        self.columns = list(pairwise(accumulate((len(weight) for weight in weights), initial=0)))
        self.weight = PackedWeight.pack(torch.cat(weights))
        self.bias: Tensor | None = None
        if any(bias is not None for _, bias in both):
            parts = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in both]
            self.bias = torch.cat(parts)
        self._pool = next((hook.pool for hook in hooks if hook is not None), None)
        self._holder = holder
        self._kernels = kernels
        self._made: Outputs | None = None
        self._uses = 0

    def base(self, x: Tensor) -> Tensor:
        """[T, all outputs] without adapters."""
        return self.weight.linear(x.reshape(-1, x.shape[-1]), self.bias)

    def outputs(self, x: Tensor) -> Tensor:
        """[T, all outputs] with the adapters of the step."""
        step, made = self._holder.step, self._made
        if made is None or made.x is not x or made.step is not step:
            made = self._made = Outputs(x, step, self._compute(x, step))
            self._uses = 0
        self._uses += 1
        if self._uses == len(self.columns):
            self._made = None
        return made.y

    def _compute(self, x: Tensor, step: Step | None) -> Tensor:
        y, pool, kernels = self.base(x), self._pool, self._kernels
        if step is None or pool is None or not (step.lora.segments or step.lora.affine):
            return y
        if len(y) != step.lora.num_tokens:
            raise RuntimeError(f"{pool.modules} got {len(y)} rows of {step.lora.num_tokens} tokens")
        h = kernels.lora_shrink(x.reshape(len(y), -1).contiguous(), pool, step.lora)
        kernels.lora_expand(h, pool, y, step.lora)
        if step.lora.affine:
            kernels.lora_affine(y, pool, step.lora)
        return y


class Member:
    """Takes the place of one linear's ``forward``."""

    def __init__(self, packed: PackedLinear, place: int, hook: AdaptedForward | None) -> None:
        self._packed = packed
        self._begin, self._end = packed.columns[place]
        self.hook = hook

    def __call__(self, x: Tensor) -> Tensor:
        plain = None if self.hook is None else self.hook.plain
        y = self._packed.base(x) if plain is not None else self._packed.outputs(x)
        own = y[:, self._begin : self._end].view(*x.shape[:-1], self._end - self._begin)
        if plain is None or self.hook is None:
            return own
        return plain(self.hook.pool, self.hook.place, x, own)

    def weight(self) -> Tensor:
        """[out, in], a copy."""
        return self._packed.weight.rows(self._begin, self._end)

    def bias(self) -> Tensor | None:
        bias = self._packed.bias
        return None if bias is None else bias[self._begin : self._end]

    def data(self) -> Tensor:
        """Return this member's part of the packed weight, flat."""
        k = self._packed.weight.k
        return self._packed.weight.data.view(-1)[self._begin * k : self._end * k]


class PackedLinears:
    """Linears of a model that have been packed together; :meth:`undo` takes it back."""

    def __init__(
        self,
        modules: dict[str, Any],
        spec: GenericSpec,
        hooks: Sequence[AdaptedForward],
        holder: Holder,
        kernels: Backend,
    ) -> None:
        """Packs those linears of the spec that can be: usual ones, with a weight of their own."""
        shared, by_name = _shared(modules), {hook.name: hook for hook in hooks}
        self.by_name: dict[str, Member] = {}
        self._modules = modules
        groups: dict[tuple[int, str], list[str]] = {}
        for linear in spec.linears:
            groups.setdefault((linear.layer, linear.group), []).append(linear.name)
        for names in groups.values():
            if not all(_fits(modules[name], shared) for name in names):
                continue
            own = [by_name.get(name) for name in names]
            packed = PackedLinear([modules[name] for name in names], own, holder, kernels)
            for place, (name, hook) in enumerate(zip(names, own, strict=True)):
                member = self.by_name[name] = Member(packed, place, hook)
                module = modules[name]
                module.forward = member
                # Who looks at the weight sees its type; what it holds is of use only to the library.
                module.weight.data = member.data().view(module.weight.shape)

    def undo(self) -> None:
        """Let all modules compute by themselves again."""
        for name, member in self.by_name.items():
            module, weight = self._modules[name], member.weight()
            usual = isinstance(module, torch.nn.Linear)
            module.weight.data = weight if usual else weight.T.contiguous()
            own: Callable[..., Tensor] = functools.partial(type(module).forward, weakref.proxy(module))
            module.forward = own if member.hook is None else member.hook
        self.by_name.clear()


def _fits(module: Any, shared: set[int]) -> bool:
    from transformers.pytorch_utils import Conv1D

    if type(module).forward not in (torch.nn.Linear.forward, Conv1D.forward) or id(module.weight) in shared:
        return False
    (n, k), dtype = base_weight(module)[0].shape, module.weight.dtype
    return PackedWeight.fits(n, k, dtype)


def _shared(modules: dict[str, Any]) -> set[int]:
    """Return the ids of parameters that several modules have."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
