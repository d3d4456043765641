"""Adapters on the modules of a model: on linears by forward hooks, and on the parameters of experts and
routers (PEFT's ``target_parameters``) by transformers' interface for experts, or by weights with them added.

A token's experts depend on its router, so each token is computed with its own adapter. Experts that use the
interface are grouped, and adapters are added to their products, all in one batch. Other modules run, as with
PEFT, with weights that have an adapter added: once for the tokens of each adapter, as exact, but slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from aioengine.kernels import ExpertPlan, LoRABatch, LoRAPool, Segment
from aioengine.model.generic.spec import Adaptable, GenericSpec
from aioengine.model.generic.step import Holder
from aioengine.model.generic.weights import experts_weight, uses_interface
from aioengine.model.slots.pool import LoRASlots

EXPERTS = "aioengine"
"""Name of the engine's way to compute experts in transformers' registry."""


class LinearAdapters:
    """Forward hook of a linear: adds to its outputs what the adapters of their tokens make of its inputs."""

    def __init__(self, name: str, pool: LoRAPool, holder: Holder) -> None:
        self._name, self._pool, self._holder = name, pool, holder

    def __call__(self, _: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        x, pool, step, kernels = inputs[0], self._pool, self._holder.step, self._holder.kernels
        if self._holder.plain:
            a = pool.a(0, 0)
            b = pool.b(0, 0).to(a.dtype)  # it may be whole numbers
            return y + ((x.to(a.dtype) @ a.T) @ b.T).to(y.dtype)
        if step is None or not (step.lora.segments or step.lora.affine):
            return None
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        _check_rows(self._name, len(rows), step.lora)
        out = y.reshape(len(rows), -1).contiguous()
        kernels.lora_expand(kernels.lora_shrink(rows, pool, step.lora), pool, out, step.lora)
        if step.lora.affine:
            kernels.lora_affine(out, pool, step.lora)
        return out.view(y.shape)


class Adapted(NamedTuple):
    """A parameter with the slots' adapters on it."""

    of: Adaptable
    pool: LoRAPool

    def place(self, slot: int) -> int:
        """Return the number of the first expert's place among those of the pool."""
        return slot * self.pool.slots.per_slot if self.of.experts else slot

    def has(self, slot: int) -> bool:
        """Whether the adapter in a slot is on this parameter; then it is on all experts."""
        return self.pool.where(self.place(slot), 0).a_rank > 0

    def on(self, parameter: Tensor, slot: int, scale: float = 1.0) -> Tensor:
        """Return a copy of the parameter with the adapter in this slot, scaled, added.

        The sums of one expert after the other are in float32, so that no more than the copy takes memory.
        """
        copy = parameter.detach().clone()
        for expert, matrix in enumerate(copy if self.of.experts else (copy,)):
            place = self.place(slot) + expert
            delta = scale * (self.pool.b(place, 0).float() @ self.pool.a(place, 0).float())
            matrix.copy_(matrix + (delta.T if self.of.turned else delta))
        return copy


def merged(adapted: Mapping[str, Adapted], module: Any, slot: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Return those parameters of a module that the adapter in a slot is on, with it added."""
    parameters = dict(module.named_parameters(recurse=False))
    return {name: one.on(parameters[name], slot, scale) for name, one in adapted.items() if one.has(slot)}


class PerAdapter(torch.nn.Module):
    """Takes the place of a module with adapters on its parameters: that runs once for the tokens of each."""

    def __init__(self, module: Any, adapted: Mapping[str, Adapted], holder: Holder) -> None:
        super().__init__()
        self.inner = module
        self._adapted, self._holder = adapted, holder

    def __getattr__(self, name: str) -> Any:
        """Return what the module has, because its model may look at it."""
        own = super().__getattr__("inner")
        return own if name == "inner" else getattr(own, name)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        step, adapted = self._holder.step, self._adapted
        if step is None or not any(one.has(s.slot) for s in step.lora.segments for one in adapted.values()):
            return self.inner(x, *more, **named)
        _check_rows(next(iter(adapted.values())).of.owner, x.numel() // x.shape[-1], step.lora)
        outputs = []
        for begin, end, segment in _runs(step.lora):
            some = [_rows(one, step.lora.num_tokens, begin, end) for one in (x, *more)]
            others = {name: _rows(one, step.lora.num_tokens, begin, end) for name, one in named.items()}
            own = {} if segment is None else merged(adapted, self.inner, segment.slot, segment.weight)
            outputs.append(functional_call(self.inner, own, tuple(some), others))
        return _joined(outputs)


class Experts:
    """State of a module of stacked experts: the adapters on its parameters."""

    def __init__(self, adapted: Mapping[str, Adapted], holder: Holder) -> None:
        self._adapted, self._holder = adapted, holder

    def product(self, module: Any, name: str, x: Tensor, plan: ExpertPlan) -> Tensor:
        """Return the products of the experts' rows with a parameter, and the adapters on it."""
        step, kernels = self._holder.step, self._holder.kernels
        bias = getattr(module, f"{name}_bias").flatten() if module.has_bias else None
        weight, dtype = experts_weight(module, name), getattr(module, name).dtype
        x = x.to(dtype).contiguous()
        out = kernels.expert_linear(x, weight, bias, plan)
        one = self._adapted.get(name)
        if one is not None and step is not None and step.lora.segments:
            batch = plan.lora(step.lora, one.pool.slots.per_slot, 1)
            kernels.lora_expand(kernels.lora_shrink(x, one.pool, batch), one.pool, out, batch)
        return out


def _experts_forward(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Compute experts as transformers' functions of this interface do, with the adapters of the step."""
    state: Experts = module.aioengine
    first = "gate_up_proj" if module.has_gate else "up_proj"
    plan = ExpertPlan(chosen, len(getattr(module, first)))
    y = state.product(module, first, x[plan.tokens], plan)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = state.product(module, "down_proj", y, plan)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    return plan.total(y, weights).to(x.dtype)


class Adapters:
    """The adapters of the slots on a model."""

    def __init__(self, model: Any, spec: GenericSpec, slots: LoRASlots | None, holder: Holder) -> None:
        """Put them on everything that the slots have room for."""
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_forward)
        modules: dict[str, Any] = dict(model.named_modules())
        held = set() if slots is None else set(slots.layout.modules)
        self._bare: dict[str, dict[str, Adapted]] = {}
        self._any = False
        for x in spec.adapted:
            if slots is None or not held.issuperset(x.names):
                continue
            self._any = True
            pool = slots.outer[x.module]
            if x.bare:
                self._bare.setdefault(x.owner, {})[x.parameter] = Adapted(x, pool)
            else:
                modules[x.owner].register_forward_hook(LinearAdapters(x.owner, pool, holder))
        for name, module in modules.items():
            if uses_interface(module):
                module.aioengine = Experts(self._bare.get(name, {}), holder)
            elif name in self._bare:
                model.set_submodule(name, PerAdapter(module, self._bare[name], holder))
        self._owners = {name: modules[name] for name in self._bare}
        self._holder = holder

    def __bool__(self) -> bool:
        return self._any

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Context in which the adapter in slot 0 is added to all rows: to the weights, or as two products."""
        own = {name: dict(module.named_parameters(recurse=False)) for name, module in self._owners.items()}
        self._holder.plain = True
        try:
            for name, module in self._owners.items():
                module._parameters.update(merged(self._bare[name], module, 0))
            yield
        finally:
            self._holder.plain = False
            for name, module in self._owners.items():
                module._parameters.update(own[name])


def _check_rows(name: str, rows: int, lora: LoRABatch) -> None:
    if rows != lora.num_tokens:
        raise RuntimeError(f"{name} got {rows} rows of {lora.num_tokens} tokens")


def _runs(lora: LoRABatch) -> Iterator[tuple[int, int, Segment | None]]:
    """Yield begin and end of tokens that adjoin and have the same adapter, with its segment; None: no
    adapter."""
    at = 0
    for segment in lora.segments:
        if at < segment.start:
            yield at, segment.start, None
        yield segment.start, segment.stop, segment
        at = segment.stop
    if at < lora.num_tokens:
        yield at, lora.num_tokens, None


def _rows(value: Any, count: int, begin: int, end: int) -> Any:
    """Return the rows of a tensor [count, n] or [1, count, n]; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() >= 2 and value.numel() == count * value.shape[-1]:
        return value[..., begin:end, :]
    return value


def _joined(outputs: Sequence[Any]) -> Any:
    """Return outputs for some rows each, tensors or tuples of these, as one."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(parts) for parts in zip(*outputs, strict=True))
    if not isinstance(outputs[0], Tensor):
        return outputs[0]
    return torch.cat(list(outputs), dim=-2 if outputs[0].dim() >= 2 else 0)
