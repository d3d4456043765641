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
from aioengine.kernels.plan.attention import locate
from aioengine.kernels.portable.cells import put
from aioengine.kernels.portable.sdpa import Chunk, Window, Windows, attend
from aioengine.model.generic.step import Allowed, Holder, Step

NAME = "aioengine"
"""Name of this attention in transformers' registries."""

_MASK = "_aioengine_allowed"


class Unsuitable(Exception):
    """Error for a model whose attention the engine cannot replace."""


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
    kind, place = holder.mask_kind(layer, allowed, query.device), holder.index[layer]
    cache = LayerCache(holder.cache.k[place], holder.cache.v[place])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    d = q.shape[2]
    scale = d**-0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.detach().to(q.dtype)
    scores = Scores(kind.window, scale, softcap, sinks)
    if not kind.odd and q.shape[2] == v.shape[2] and k.shape == v.shape and d % 2 == 0:
        qkv = torch.cat([q, k, v], dim=1)
        holder.kernels.rope_store(qkv, None, _no_rotation(step, step.plan, d), cache, step.plan)
        return holder.kernels.paged_attention(qkv, cache, step.plan, scores).view(1, len(q), -1, d), None
    put(cache.keys, step.plan.cells, k)
    put(cache.values, step.plan.cells, v)
    window = step.plan.derive(Windows).of(kind.window, q.dtype)
    if kind.odd:
        assert allowed is not None
        window = _asked(step, step.plan, allowed, q.dtype)
    return attend(q, k, v, cache, window, scores)[None], None


def _no_rotation(step: Step, plan: AttentionPlan, d: int) -> Rotation:
    """Return a rotation that leaves everything where it is."""
    if d not in step.made:
        cos = torch.ones(len(plan.positions), 1, d // 2, device=plan.device)
        step.made[d] = Rotation(cos, torch.zeros_like(cos))
    made: Rotation = step.made[d]
    return made


def _asked(step: Step, plan: AttentionPlan, allowed: Allowed, dtype: torch.dtype) -> Window:
    """Return the masks of a function that is no window, with one chunk for each sequence."""
    if id(allowed) not in step.made:
        device, chunks = plan.device, []
        zero = torch.zeros(1, 1, dtype=torch.long, device=device)
        for i, (row, length, start) in enumerate(plan.spans):
            every = torch.arange(start + length)
            cells = locate(plan.host_tables, plan.block_size, torch.tensor(i), every).to(device)
            every = every.to(device)
            seen = allowed(zero, zero, every[start:, None], every[None]).expand(length, start + length)
            mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
            chunks.append(Chunk(row, length, cells, mask))
        step.made[id(allowed)] = allowed, Window((), tuple(chunks))  # the function lives as long as its id
    made: Window = step.made[id(allowed)][1]
    return made
