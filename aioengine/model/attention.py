"""Attention over the paged KV cache, for any mixture of decode rows and prompt chunks.

Rows with one query token are computed together: their keys are gathered into one padded batch.
Sequences with more tokens are computed one by one under a causal mask relative to absolute positions,
so a chunk may start anywhere. All indices and masks are built once a step (:class:`AttentionPlan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.model.kv_cache import KVCache


class Span(NamedTuple):
    """One sequence's share of a step: rows ``row..row+length-1`` hold the tokens from ``start`` on."""

    row: int
    length: int
    start: int


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


class WindowPlan(NamedTuple):
    decode: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


class AttentionPlan:
    """A step's attention metadata.

    ``spans`` cover the token axis in order, ``tables`` are the block tables, ``windows`` the distinct
    window sizes of the model's layers (None: full attention). Masks are made in ``dtype``.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        tables: Sequence[Sequence[int]],
        windows: Iterable[int | None],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        width = max(len(table) for table in tables)
        padded = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables])
        counts = torch.tensor([span.length for span in spans])
        first = torch.tensor([span.start - span.row for span in spans])
        sequence = torch.repeat_interleave(torch.arange(len(spans)), counts)
        positions = torch.arange(len(sequence)) + first[sequence]
        self._spans, self._tables, self._block_size = spans, padded, block_size
        self._windows = tuple(windows)
        self._dtype, self._device = dtype, device
        self.positions = positions.to(device)
        """[T] absolute position of each token."""
        self.cells = self._cells(sequence, positions).to(device)
        """[T] the cell where each token's key and value are stored."""

    @cached_property
    def windows(self) -> dict[int | None, WindowPlan]:
        """Indices and masks by window size, for :func:`paged_attention`."""
        return {window: self._window_plan(self._spans, window) for window in self._windows}

    @cached_property
    def spans(self) -> Tensor:
        """[N, 3] row, length and start of each sequence (int32)."""
        return torch.tensor(self._spans, dtype=torch.int32)

    @cached_property
    def tables(self) -> Tensor:
        """[N, width] block tables, padded (int32)."""
        return self._tables.to(torch.int32)

    @cached_property
    def last(self) -> Tensor:
        """[T] whether a token is its sequence's last in this step (uint8)."""
        last = torch.zeros(len(self.positions), dtype=torch.uint8)
        last[[span.row + span.length - 1 for span in self._spans]] = 1
        return last

    def _cells(self, sequence: Tensor, positions: Tensor) -> Tensor:
        """The cells of ``positions`` in the sequences of these indices (broadcast)."""
        block = self._tables[sequence, positions // self._block_size]
        return block * self._block_size + positions % self._block_size

    def _window_plan(self, spans: Sequence[Span], window: int | None) -> WindowPlan:
        by_length: dict[int, list[int]] = {}
        chunks: list[Chunk] = []
        for i, span in enumerate(spans):
            if span.length > 1:
                chunks.append(self._chunk(i, span, window))
            else:
                # Contexts within a factor of two share a group, so padding at most doubles the work.
                length = min(span.start + 1, window or span.start + 1)
                by_length.setdefault(max(length - 1, 127).bit_length(), []).append(i)
        groups = (self._decode_group(spans, members, window) for members in by_length.values())
        return WindowPlan(tuple(groups), tuple(chunks))

    def _decode_group(self, spans: Sequence[Span], members: list[int], window: int | None) -> DecodeGroup:
        last = torch.tensor([spans[i].start for i in members])[:, None]
        first = torch.zeros_like(last) if window is None else (last - window + 1).clamp(min=0)
        length = int((last - first).max()) + 1
        positions = first + torch.arange(length)
        # Padding must not read another sequence's cells: a NaN there would survive the mask (0 * NaN).
        cells = self._cells(torch.tensor(members)[:, None], positions.minimum(last))
        mask = self._additive(positions <= last)[:, None, None, :]
        rows = torch.tensor([spans[i].row for i in members])
        device = self._device
        return DecodeGroup(rows.to(device), cells.flatten().to(device), mask)

    def _chunk(self, index: int, span: Span, window: int | None) -> Chunk:
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
        cells = None
        if start > 0:
            cells = self._cells(torch.tensor(index), keys).to(self._device)
        return Chunk(row, length, cells, self._additive(allowed))

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self._dtype)
        return mask.masked_fill_(~allowed, float("-inf")).to(self._device)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int, plan: AttentionPlan, window: int | None
) -> Tensor:
    """Stores k and v, then attends: ``q`` [T, heads, d], ``k``, ``v`` [T, kv_heads, d] -> [T, heads * d]."""
    tokens, heads, d = q.shape
    kv_heads = k.shape[1]
    k_cells, v_cells = cache.cells(layer)
    k_cells.index_copy_(0, plan.cells, k)
    v_cells.index_copy_(0, plan.cells, v)
    # Query head h reads key head h // group: regrouped, grouped-query attention is a batch dimension.
    q = q.view(tokens, kv_heads, heads // kv_heads, d)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    window_plan = plan.windows[window]

    for rows, cells, mask in window_plan.decode:
        batch = len(rows)
        k_b = k_cells.index_select(0, cells).view(batch, -1, kv_heads, d).transpose(1, 2)
        v_b = v_cells.index_select(0, cells).view(batch, -1, kv_heads, d).transpose(1, 2)
        everything = batch == tokens
        q_b = q if everything else q.index_select(0, rows)
        out_b = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=mask)
        if everything:
            return out_b.reshape(tokens, -1)
        out.index_copy_(0, rows, out_b)

    for row, length, chunk_cells, chunk_mask in window_plan.chunks:
        stop = row + length
        if chunk_cells is None:
            k_s, v_s = k[row:stop], v[row:stop]
        else:
            k_s, v_s = k_cells.index_select(0, chunk_cells), v_cells.index_select(0, chunk_cells)
        q_s = q[row:stop].permute(1, 2, 0, 3)  # [kv_heads, group, length, d]
        k_s, v_s = (t.transpose(0, 1)[:, None].expand(-1, q_s.shape[1], -1, -1) for t in (k_s, v_s))
        out_s = F.scaled_dot_product_attention(
            q_s, k_s, v_s, attn_mask=chunk_mask, is_causal=chunk_mask is None
        )
        out[row:stop] = out_s.permute(2, 0, 1, 3)
    return out.flatten(1)
