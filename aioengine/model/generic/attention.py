"""The attention that transformers' modules call, over the engine's pages.

Queries, keys and values come as transformers makes them, with positions in them; what the model says beside
them (scale, soft cap, sinks, mask) is honoured. Which keys a query sees is asked of transformers' own mask
functions, by positions within the sequence, so that all tokens of a step can go through a model side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from aioengine.kernels import AttentionPlan, LayerCache, Rotation, Scores
from aioengine.kernels.portable.cells import put
from aioengine.kernels.portable.sdpa import Windows, attend
from aioengine.model.generic.step import Allowed, Holder, Step, Unsuitable

NAME = "aioengine"
"""Name of this attention in transformers' registries."""

_MASK = "_aioengine_allowed"


def register() -> None:
    """Make the attention known to transformers; it has no state."""
    transformers.AttentionInterface.register(NAME, _attend)
    transformers.AttentionMaskInterface.register(NAME, _mask)


def _mask(*_: Any, mask_function: Allowed, use_vmap: bool = False, **__: Any) -> Tensor:
    """Return a tensor that stands for the mask and carries the mask's function."""
    if use_vmap:
        raise Unsuitable("its masks depend on more than positions")
    mask = torch.zeros(1, 1, 1, 1)
    setattr(mask, _MASK, mask_function)
    return mask


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query`` [1, H, T, d], ``key`` [1, K, T, d], ``value`` [1, K, T, e]; returns [1, T, H, e]."""
    holder: Holder = module.aioengine
    step, layer = holder.step, module.layer_idx
    assert step is not None and step.plan is not None
    allowed: Allowed | None = None
    if attention_mask is not None:
        allowed = getattr(attention_mask, _MASK, None)
        if allowed is None:
            raise Unsuitable(f"layer {layer} makes its own mask")
    window, place = holder.window(layer, allowed, query.device), holder.index[layer]
    cache = LayerCache(holder.cache.k[place], holder.cache.v[place])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    d = q.shape[2]
    scale = d**-0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.detach().to(q.dtype)
    scores = Scores(window, scale, softcap, sinks)
    if q.shape[2] == v.shape[2] and k.shape == v.shape and d % 2 == 0:
        qkv = torch.cat([q, k, v], dim=1)
        holder.kernels.rope_store(qkv, None, _no_rotation(step, step.plan, d), cache, step.plan)
        return holder.kernels.paged_attention(qkv, cache, step.plan, scores).view(1, len(q), -1, d), None
    put(cache.keys, step.plan.cells, k)
    put(cache.values, step.plan.cells, v)
    return attend(q, k, v, cache, step.plan.derive(Windows).of(window, q.dtype), scores)[None], None


def _no_rotation(step: Step, plan: AttentionPlan, d: int) -> Rotation:
    if d not in step.rotations:
        cos = torch.ones(len(plan.positions), 1, d // 2, device=plan.device)
        step.rotations[d] = Rotation(cos, torch.zeros_like(cos))
    return step.rotations[d]
