"""The attention that transformers' modules call, over the engine's pages.

Queries, keys and values come as transformers makes them, with positions in them; what the model says beside
them (scale, soft cap, sinks, mask) is honoured. Which keys a query sees is asked of transformers' own mask
functions, by positions within the sequence, so that all tokens of a step can go through a model side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels import AttentionPlan, Backend, LayerCache, Rotation, Scores
from aioengine.kernels.plan.attention import locate
from aioengine.kernels.portable.cells import put, take
from aioengine.kernels.portable.sdpa import Chunk, DecodeGroup, Window, Windows
from aioengine.model.generic.step import Allowed, Holder, Kind, Step, Turn, kind_of

NAME = "aioengine"
"""Name of this attention in transformers' registries."""

StoreAndAttend = Callable[[Tensor, Rotation, LayerCache, AttentionPlan, Scores], Tensor]

_MASK = "_aioengine_allowed"


class Attended(NamedTuple):
    """One call of the attention that the engine's kernels compute."""

    cache: LayerCache
    scores: Scores
    heads: int
    head_dim: int
    turn: Turn | None


class Unsuitable(Exception):
    """Error for a model whose attention the engine cannot replace."""


def register() -> None:
    """Make the attention known to transformers; it has no state."""
    import transformers

    transformers.AttentionInterface.register(NAME, _attend)
    transformers.AttentionMaskInterface.register(NAME, _mask)


class Attends:
    """State of a hooked attention module: the model that it belongs to, and how it computes."""

    def __init__(self, holder: Holder, kernels: Backend, longest: int) -> None:
        self.holder = holder
        self.longest = longest
        self._kernels = kernels
        self._ours: StoreAndAttend | None = None
        if kernels.name == "cpu":
            from aioengine.kernels.cpu.layer import store_and_attend

            self._ours = store_and_attend

    def store_and_attend(
        self, qkv: Tensor, rotation: Rotation, cache: LayerCache, plan: AttentionPlan, scores: Scores
    ) -> Tensor:
        """Rotate queries and keys, store keys and values, and attend to what is stored."""
        if self._ours is not None:
            return self._ours(qkv, rotation, cache, plan, scores)
        self._kernels.rope_store(qkv, None, rotation, cache, plan)
        return self._kernels.paged_attention(qkv, cache, plan, scores)


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
    attends: Attends = module.aioengine
    holder = attends.holder
    step, layer = holder.step, module.layer_idx
    assert step is not None and step.plan is not None
    allowed: Allowed | None = None
    if attention_mask is not None:
        allowed = getattr(attention_mask, _MASK, None)
        if allowed is None:
            raise Unsuitable(f"layer {layer} makes its own mask")
    kind = holder.kinds.get(layer)
    if kind is None:
        kind = holder.kinds[layer] = kind_of(allowed, attends.longest, query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = holder.cache.k[holder.index[layer]], holder.cache.v[holder.index[layer]]
    d, e = query.shape[-1], value.shape[-1]
    ours = not kind.odd and d == e and key.shape == value.shape and d % 2 == 0
    rotation: Rotation | None = None
    turn, step.turn = step.turn, None
    if turn is not None:
        if turn.query is not query or turn.key is not key:
            raise Unsuitable(f"layer {layer} does more to queries and keys after their rotation")
        if ours:
            rotation = turn.rotation
        else:
            query, key = turn.own()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if ours:
        qkv, cache = _joined(q, k, v), LayerCache(keys, values)
        rotation = no_rotation(step, d) if rotation is None else rotation
        scores = Scores(kind.window, scale, softcap, None if s_aux is None else s_aux.detach().to(q.dtype))
        if holder.seen is not None:
            holder.seen.append(Attended(cache, scores, q.shape[1], d, turn))
        out = attends.store_and_attend(qkv, rotation, cache, step.plan, scores)
        return out.view(1, len(q), -1, e), None
    put(keys, step.plan.cells, k)
    put(values, step.plan.cells, v)
    window = _window(step, layer, kind, allowed, q.dtype)
    out = q.new_empty(len(q), q.shape[1], e)
    for rows, k_cells, mask in _parts(window, step.plan):
        batch = len(rows) if mask is None or mask.shape[2] == 1 else 1
        k_b = _batched(take(keys, k_cells), batch)
        v_b = _batched(take(values, k_cells), batch)
        q_b = _batched(q.index_select(0, rows), batch)
        out_b = _softmax_attention(q_b, k_b, v_b, mask, scale, softcap, s_aux)
        out.index_copy_(0, rows, out_b.transpose(1, 2).flatten(0, 1))
    return out[None], None


def _joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return queries, keys and values [T, heads, d] as one tensor [T, H + 2 K, d], contiguous: where they
    are, if they lie side by side as one product made them."""
    (tokens, heads, d), kv_heads = q.shape, k.shape[1]
    strides = (heads + 2 * kv_heads) * d, d, 1
    if q.stride() == k.stride() == v.stride() == strides:
        memory, begin, size = q.untyped_storage().data_ptr(), q.data_ptr(), d * q.itemsize
        if (
            k.data_ptr() == begin + heads * size
            and v.data_ptr() == begin + (heads + kv_heads) * size
            and memory == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        ):
            return q.as_strided((tokens, heads + 2 * kv_heads, d), strides)
    return torch.cat([q, k, v], dim=1)


def _batched(rows: Tensor, batch: int) -> Tensor:
    """Return ``rows`` [batch * n, heads, d] as [batch, heads, n, d]."""
    return rows.view(batch, -1, *rows.shape[1:]).transpose(1, 2)


def no_rotation(step: Step, d: int) -> Rotation:
    """Return a rotation that leaves everything where it is."""
    assert step.plan is not None
    if d not in step.made:
        cos = torch.ones(len(step.plan.positions), 1, d // 2, device=step.plan.device)
        step.made[d] = Rotation(cos, torch.zeros_like(cos))
    made: Rotation = step.made[d]
    return made


def _window(step: Step, layer: int, kind: Kind, allowed: Allowed | None, dtype: torch.dtype) -> Window:
    plan = step.plan
    assert plan is not None
    if not kind.odd:
        return plan.derive(Windows).of(kind.window, dtype)
    assert allowed is not None
    if id(allowed) not in step.made:
        step.made[id(allowed)] = allowed, _asked(plan, allowed, dtype)
    made: Window = step.made[id(allowed)][1]
    return made


def _asked(plan: AttentionPlan, allowed: Allowed, dtype: torch.dtype) -> Window:
    """Make the plan for a mask that is no window, with one chunk for each sequence."""
    device, chunks = plan.device, []
    zero = torch.zeros(1, 1, dtype=torch.long)
    for i, (row, length, start) in enumerate(plan.spans):
        every = torch.arange(start + length)
        seen = allowed(zero, zero, every[start:, None], every[None]).expand(length, start + length)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf")).to(device)
        cells = locate(plan.host_tables, plan.block_size, torch.tensor(i), every).to(device)
        chunks.append(Chunk(row, length, cells, mask))
    return Window((), tuple(chunks))


def _parts(window: Window, plan: AttentionPlan) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield rows of queries, the cells of their keys, and what is added to their scores (None: causal)."""
    group: DecodeGroup
    for group in window.decode:
        yield group.rows, group.cells, group.mask
    for row, length, cells, mask in window.chunks:
        rows = torch.arange(row, row + length, device=plan.device)
        if cells is None:
            cells = plan.cells[row : row + length]
        if mask is None:
            full = torch.full((length, length), float("-inf"), device=plan.device)
            mask = full.triu(1)
        yield rows, cells, mask[None, None]


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``q`` [B, H, Q, d], ``k`` [B, K, L, d], ``v`` [B, K, L, e], ``mask`` [B or 1, 1, Q, L]; returns
    [B, H, Q, e]. Scores are capped by ``softcap * tanh(s / softcap)``; ``sinks`` [H] are scores of keys
    without values (Xiao et al., 2023, arXiv:2309.17453)."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if softcap is None and sinks is None:
        if mask is not None:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
        )
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask.float()
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(len(q), -1, q.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)
    return weights[..., : k.shape[2]].to(v.dtype) @ v
