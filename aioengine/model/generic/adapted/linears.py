"""Adapters on the linears of a model: each hooked module adds the outputs of its tokens' adapters.

Linears with the same input share one product with their As, which the first called one computes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aioengine.kernels import Backend, LoRAPool
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.generic.step import Holder
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import NO_LAYER

Forward = Callable[..., Tensor]


class AdaptedForward:
    """Takes the place of a linear's ``forward``."""

    def __init__(
        self, name: str, forward: Forward, pool: LoRAPool, place: int, holder: Holder, kernels: Backend
    ) -> None:
        self.name = name
        self.inner = forward
        """The linear without adapters."""
        self.pool = pool
        self.place = place
        """Index among the pool's modules."""
        self._own = pool._replace(
            modules=(pool.modules[place],),
            first=pool.first + place,
            widths=(pool.widths[place],),
            b_offsets=(0,),
            affine_widths=(pool.affine_widths[place],),
            offsets=(0,),
        )
        """The pool as if there were no other modules in it."""
        self._holder = holder
        self._kernels = kernels
        self.plain: Callable[[LoRAPool, int, Tensor, Tensor], Tensor] | None = None
        """If it is set, it computes in place of everything here: the probe compares with it."""

    def __call__(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.plain is not None:
            return self.plain(self.pool, self.place, x, y)
        step = self._holder.step
        if step is None or not (step.lora.segments or step.lora.affine):
            return y
        pool, place, batch, kernels = self.pool, self.place, step.lora, self._kernels
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) != batch.num_tokens:
            raise RuntimeError(f"{self.name} got {len(rows)} rows of {batch.num_tokens} tokens")
        last = step.shrunk.get(id(pool))
        if last is None or last[0] is not x:
            rows = rows.contiguous()
            last = step.shrunk[id(pool)] = x, kernels.lora_shrink(rows, pool, batch)
        out = y.reshape(len(rows), -1)
        out = out if out.is_contiguous() else out.contiguous()
        h = last[1] if len(pool.modules) == 1 else last[1][:, place : place + 1].contiguous()
        kernels.lora_expand(h, self._own, out, batch)
        if batch.affine:
            kernels.lora_affine(out, self._own, batch)
        return out.view(y.shape)


def hook(
    model: Any, spec: GenericSpec, slots: LoRASlots | None, holder: Holder, kernels: Backend
) -> list[AdaptedForward]:
    """Hook all linears that the slots have room for."""
    if slots is None:
        return []
    made = []
    modules = dict(model.named_modules())
    held = set(slots.layout.modules)
    for linear in spec.linears:
        if linear.module not in held:
            continue
        pools = slots.outer if linear.layer == NO_LAYER else slots.layers[linear.layer]
        pool, module = pools[linear.group], modules[linear.name]
        place = pool.modules.index(linear.module)
        # Not the module's bound method: memory in a reference cycle would not be free when the model is gone.
        inner = functools.partial(type(module).forward, weakref.proxy(module))
        module.forward = AdaptedForward(linear.name, inner, pool, place, holder, kernels)
        made.append(module.forward)
    return made


def base_weight(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a linear of either kind."""
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return (weight if isinstance(module, torch.nn.Linear) else weight.T), bias


def storable(modules: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the linears of usual kinds whose weight may be stored in another form, by name, with the
    embeddings that have the same weight, as often a head's is. Nobody else has it."""
    from transformers.pytorch_utils import Conv1D

    sharers: dict[int, list[Any]] = {}
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            sharers.setdefault(id(parameter), []).append(module)
    found = {}
    for name, module in modules.items():
        if type(module).forward not in (torch.nn.Linear.forward, Conv1D.forward):
            continue
        others = [one for one in sharers[id(module.weight)] if one is not module]
        if all(map(_is_usual_embedding, others)) and (isinstance(module, torch.nn.Linear) or not others):
            found[name] = others
    return found


def _is_usual_embedding(module: Any) -> bool:
    usual = type(module).forward is torch.nn.Embedding.forward and "forward" not in vars(module)
    return usual and module.max_norm is None
