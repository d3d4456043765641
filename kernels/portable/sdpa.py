"""Paged attention in plain torch, for any mixture of decode rows and prompt chunks.

Rows with one query token are computed together: their keys are gathered into one padded batch.
Sequences with more tokens are computed one by one under a causal mask relative to absolute positions,
so a chunk may start anywhere. All indices and masks are built once a step (:class:`Windows`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels.backend import LayerCache, Scores
from aioengine.kernels.plan.attention import AttentionPlan, Span, locate
from aioengine.kernels.portable.cells import as_stored, take
from aioengine.kernels.transfer import send


class DecodeGroup(NamedTuple):
    """B rows of one token each, with contexts of similar length."""

    rows: Tensor
    """[B] rows of the step's token axis."""
    cells: Tensor
    """[B * L] the cells of each row's context; padding repeats the row's own token."""
    mask: Tensor
    """[B, 1, 1, L] added to the scores: 0 or -inf."""


class Chunk(NamedTuple):
    """One sequence with several query tokens."""

    row: int
    length: int
    cells: Tensor | None
    """[L] the cells of the context; None if it is exactly the chunk itself."""
    mask: Tensor | None
    """[length, L] added to the scores; None for plain causal attention over the chunk."""


class Window(NamedTuple):
    decode: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


class Windows:
    """Indices and masks of a step by window size, made when a layer first asks for them."""

    def __init__(self, plan: AttentionPlan) -> None:
        # Not the plan itself, which holds this.
        self._spans, self._device = plan.spans, plan.device
        self._tables, self._block_size = plan.host_tables, plan.block_size
        self._made: dict[tuple[int | None, torch.dtype], Window] = {}

    def of(self, window: int | None, dtype: torch.dtype) -> Window:
        """Make the plan for layers with this window (None: full attention) and masks of this dtype."""
        key = window, dtype
        if key not in self._made:
            self._made[key] = self._make(window, dtype)
        return self._made[key]

    def _make(self, window: int | None, dtype: torch.dtype) -> Window:
        by_length: dict[int, list[int]] = {}
        chunks: list[Chunk] = []
        for i, span in enumerate(self._spans):
            if span.length > 1:
                chunks.append(self._chunk(i, span, window, dtype))
            else:
                # Contexts within a factor of two share a group, so padding at most doubles the work.
                length = min(span.start + 1, window or span.start + 1)
                by_length.setdefault(max(length - 1, 127).bit_length(), []).append(i)
        groups = (self._decode_group(members, window, dtype) for members in by_length.values())
        return Window(tuple(groups), tuple(chunks))

    def _decode_group(self, members: list[int], window: int | None, dtype: torch.dtype) -> DecodeGroup:
        spans = self._spans
        last = torch.tensor([spans[i].start for i in members])[:, None]
        first = torch.zeros_like(last) if window is None else (last - window + 1).clamp(min=0)
        length = int((last - first).max()) + 1
        positions = first + torch.arange(length)
        # Padding must not read another sequence's cells: a NaN there would survive the mask (0 * NaN).
        cells = self._cells(torch.tensor(members)[:, None], positions.minimum(last))
        mask = _additive(positions <= last, dtype)[:, None, None, :]
        rows = torch.tensor([spans[i].row for i in members])
        return DecodeGroup(*send([rows, cells.flatten(), mask], self._device))

    def _chunk(self, index: int, span: Span, window: int | None, dtype: torch.dtype) -> Chunk:
        row, length, start = span
        stop = start + length
        first = 0 if window is None else max(0, start - window + 1)
        if start == 0 and (window is None or window >= stop):
            return Chunk(row, length, None, None)
        keys = torch.arange(first, stop)
        queries = torch.arange(start, stop)[:, None]
        allowed = keys <= queries
        if window is not None:
            allowed &= keys > queries - window
        mask = _additive(allowed, dtype)
        if start == 0:
            return Chunk(row, length, None, *send([mask], self._device))
        return Chunk(row, length, *send([self._cells(torch.tensor(index), keys), mask], self._device))

    def _cells(self, sequence: Tensor, positions: Tensor) -> Tensor:
        return locate(self._tables, self._block_size, sequence, positions)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))


def paged_attention(qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Attend to what is stored; see :class:`aioengine.kernels.backend.Backend`."""
    kv_heads = cache.keys.shape[2]
    q, k, v = qkv.tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    made = plan.derive(Windows).of(scores.window, q.dtype)
    return attend(q, k, v, cache, made, scores).flatten(1)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, made: Window, scores: Scores) -> Tensor:
    """Attend with queries [T, H, d] to what is stored, with what ``made`` says of masks and cells.

    ``k`` [T, K, d] and ``v`` [T, K, e] are the step's own, which are stored already. Returns [T, H, e].
    """
    keys, values = cache
    _, scale, soft_cap, sinks = scores
    tokens, kv_heads = len(q), keys.shape[2]
    # Query head h reads key head h // group: regrouped, grouped-query attention is a batch dimension.
    q = q.reshape(tokens, kv_heads, -1, q.shape[2])
    out = q.new_empty(*q.shape[:3], v.shape[2])
    own = None if sinks is None else sinks.view(kv_heads, -1, 1)

    for rows, cells, mask in made.decode:
        k_b, v_b = (
            take(each, cells, q.dtype).view(len(rows), -1, *each.shape[2:]).transpose(1, 2)
            for each in (keys, values)
        )
        everything = len(rows) == tokens
        q_b = q if everything else q.index_select(0, rows)
        out_b = _attend(q_b, k_b, v_b, mask, scale, soft_cap, own)
        if everything:
            return out_b.flatten(1, 2)
        out.index_copy_(0, rows, out_b)

    for row, length, chunk_cells, chunk_mask in made.chunks:
        stop = row + length
        if chunk_cells is None:
            k_s, v_s = (as_stored(each[row:stop], keys) for each in (k, v))
        else:
            k_s, v_s = (take(each, chunk_cells, q.dtype) for each in (keys, values))
        q_s = q[row:stop].permute(1, 2, 0, 3)  # [kv_heads, group, length, d]
        k_s, v_s = (t.transpose(0, 1)[:, None].expand(-1, q_s.shape[1], -1, -1) for t in (k_s, v_s))
        out_s = _attend(
            *(q_s, k_s, v_s, chunk_mask, scale, soft_cap),
            None if own is None else own[..., None],
        )
        out[row:stop] = out_s.permute(2, 0, 1, 3)
    return out.flatten(1, 2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute the attention of queries [..., Q, d] to keys and values [..., L, d]; returns [..., Q, d].
    ``mask`` [..., Q, L] is added to the scores; None: causal, Q = L. ``sinks`` are of the scores' shape
    with L = 1, or broadcast to it."""
    if soft_cap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is None:
        mask = torch.full_like(scores[0, 0], float("-inf")).triu(1)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(dim=-1)[..., : k.shape[-2]].to(v.dtype) @ v
