"""Adapters on parameters that no linear has (PEFT's ``target_parameters``): those of routers and of experts.

A token's experts depend on its router, so each token is computed with its own adapter. Where experts are of
transformers' usual kind, their products are the engine's, and adapters are added to the outputs, all in one
batch. Elsewhere, as PEFT does it, a module runs with weights that have an adapter added: once for the tokens
of each adapter, which is as exact, but slower.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import Backend, ExpertPlan, LoRABatch, LoRAPool, Segment
from aioengine.model.generic.spec import GenericSpec, Stack
from aioengine.model.generic.step import Holder
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import NO_LAYER

logger = logging.getLogger("aioengine")

_INTERFACE = ("_apply_gate", "has_gate", "has_bias", "is_transposed")
"""What transformers' ``use_experts_implementation`` gives to experts."""


class Adapted(NamedTuple):
    """A parameter with the slots' adapters on it."""

    stack: Stack
    pool: LoRAPool

    def place(self, slot: int) -> int:
        """Return the number of the first expert's place among those of the pool."""
        return slot * self.pool.slots.per_slot if self.stack.experts else slot

    def has(self, slot: int) -> bool:
        """Whether the adapter in a slot is on this parameter; then it is on all experts."""
        return self.pool.where(self.place(slot), 0).a_rank > 0

    def on(self, parameter: Tensor, slot: int, scale: float) -> Tensor | None:
        """Return a copy of the parameter with the adapter in this slot, scaled, added; None: it is not on it.

        The sums of one expert after the other are in float32, so that no more than the copy takes memory.
        """
        if not self.has(slot):
            return None
        copy = parameter.detach().clone()
        for expert, matrix in enumerate(copy if self.stack.experts else (copy,)):
            place = self.place(slot) + expert
            delta = scale * (self.pool.b(place, 0).float() @ self.pool.a(place, 0).float())
            matrix.copy_(matrix + (delta.T if self.stack.turned else delta))
        return copy


class MergedForward:
    """Takes the place of the forward of a module: it runs once for the tokens of each adapter."""

    def __init__(self, module: Any, adapted: Sequence[Adapted], holder: Holder, kernels: Backend) -> None:
        # Not the module itself: memory in a reference cycle would not be free when the model is gone.
        self._module = weakref.proxy(module)
        self.inner: Callable[..., Any] = functools.partial(type(module).forward, self._module)
        self._adapted = {one.stack.parameter: one for one in adapted}
        self._holder = holder
        self._kernels = kernels
        self.plain = False
        """Whether all tokens get the adapter in slot 0: the probe compares with that."""

    def __call__(self, x: Tensor, *more: Any, **named: Any) -> Any:
        if self.plain:
            with self._with_adapter(0):
                return self.inner(x, *more, **named)
        step = self._holder.step
        if step is None or not self._is_adapted(step.lora):
            return self.inner(x, *more, **named)
        rows = x.numel() // x.shape[-1]
        if rows != step.lora.num_tokens:
            owner = next(iter(self._adapted.values())).stack.owner
            raise RuntimeError(f"{owner} got {rows} rows of {step.lora.num_tokens} tokens")
        return self._mixed(step.lora, x, *more, **named)

    def _is_adapted(self, lora: LoRABatch) -> bool:
        """Whether an adapter of the step is on one of the parameters."""
        adapted = self._adapted.values()
        return any(one.has(segment.slot) for segment in lora.segments for one in adapted)

    def _mixed(self, lora: LoRABatch, x: Tensor, *more: Any, **named: Any) -> Any:
        outputs = []
        for begin, end, segment in _runs(lora):
            arguments = [_rows(one, lora.num_tokens, begin, end) for one in (x, *more)]
            others = {name: _rows(one, lora.num_tokens, begin, end) for name, one in named.items()}
            with nullcontext() if segment is None else self._with_adapter(segment.slot, segment.weight):
                outputs.append(self.inner(*arguments, **others))
        return _joined(outputs)

    @contextmanager
    def _with_adapter(self, slot: int, scale: float = 1.0) -> Iterator[None]:
        """Context in which the parameters have this slot's adapter added."""
        parameters = self._module._parameters
        own = dict(parameters)
        for name, one in self._adapted.items():
            adapted = one.on(own[name], slot, scale)
            if adapted is not None:
                parameters[name] = adapted
        try:
            yield
        finally:
            parameters.update(own)


class ExpertsForward(MergedForward):
    """Takes the place of the forward of experts of transformers' usual kind, which have an interface for
    other ways to compute them."""

    @classmethod
    def fits(cls, module: Any, adapted: Sequence[Adapted]) -> bool:
        """Whether the experts are of that kind."""
        if not all(hasattr(module, name) for name in _INTERFACE):
            return False
        names = {one.stack.parameter for one in adapted}
        return names <= {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}

    def _mixed(self, lora: LoRABatch, x: Tensor, *more: Any, **named: Any) -> Any:
        if len(more) != 2 or named or x.dim() != 2:
            return super()._mixed(lora, x, *more, **named)
        module, (chosen, weights) = self._module, more
        plan = ExpertPlan(chosen, next(iter(self._adapted.values())).stack.experts)
        y = self._product("gate_up_proj" if module.has_gate else "up_proj", x[plan.tokens], plan, lora)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = self._product("down_proj", y, plan, lora)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        return plan.total(y, weights).to(x.dtype)

    def _product(self, name: str, x: Tensor, plan: ExpertPlan, lora: LoRABatch) -> Tensor:
        """Return the products of the experts' rows with a parameter, and the adapters on it."""
        module, one = self._module, self._adapted.get(name)
        weight = getattr(module, name)
        x = x.to(weight.dtype)
        parts = []
        for group in plan.groups:
            rows, matrix = x[group.start : group.stop], weight[group.expert]
            y = rows @ matrix if module.is_transposed else torch.nn.functional.linear(rows, matrix)
            parts.append(y + getattr(module, f"{name}_bias")[group.expert] if module.has_bias else y)
        out = torch.cat(parts)
        if one is not None:
            x = x.contiguous()
            batch = plan.lora(lora, one.pool.slots.per_slot, 1)
            hidden = self._kernels.lora_shrink(x, one.pool, batch)
            self._kernels.lora_expand(hidden, one.pool, out, batch)
        return out


def hook_parameters(
    modules: dict[str, Any], spec: GenericSpec, slots: LoRASlots | None, holder: Holder, kernels: Backend
) -> list[MergedForward]:
    """Hook the modules of all parameters that the slots have room for."""
    if slots is None:
        return []
    held, found = set(slots.layout.modules), dict[str, list[Adapted]]()
    for stack in spec.stacks:
        if held.issuperset(stack.modules):
            pools = slots.outer if stack.layer == NO_LAYER else slots.layers[stack.layer]
            found.setdefault(stack.owner, []).append(Adapted(stack, pools[stack.module]))
    made = []
    slow = set()
    for owner, adapted in found.items():
        module = modules[owner]
        usual = ExpertsForward.fits(module, adapted)
        if adapted[0].stack.experts and not usual:
            slow.add(type(module).__name__)
        module.forward = (ExpertsForward if usual else MergedForward)(module, adapted, holder, kernels)
        made.append(module.forward)
    for name in sorted(slow):
        logger.info("%s runs once for each adapter of a step that is on its experts", name)
    return made


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
