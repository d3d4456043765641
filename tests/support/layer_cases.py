"""Steps of one layer over caches full of NaN, for the tests of attention and of what is beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import AttentionPlan, Backend, HeadNorms, LayerCache, Rotation, Scores, Span


class LayerCase(NamedTuple):
    """Sequences that begin a step with some positions in the cache, and compute some more."""

    spans: Sequence[tuple[int, int]]
    """(positions in the cache, tokens of the step)."""
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    norms: bool = False
    whole_norms: bool = False
    """Of all heads together."""
    offset: float | None = None
    """Of the norms' weights."""
    rotated: int | None = None
    """Pairs of a head that are rotated; None: all."""
    neighbours: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


class Layer:
    """A layer's cache and the sequences in it, computed by one backend; equal for all backends."""

    def __init__(self, case: LayerCase, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        counts = [math.ceil((start + length + 2) / case.block_size) for start, length in case.spans]
        blocks = list(range(sum(counts) + 3))
        random.Random(case.seed).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in counts]
        shape = (sum(counts) + 3, case.block_size, case.kv_heads, case.head_dim)
        keys, values = torch.full((2, *shape), math.nan, dtype=case.dtype, device=device)
        self.cache = LayerCache(keys, values)
        self.norms = None
        if case.norms:
            counts = (case.heads, case.kv_heads) if case.whole_norms else (1, 1)
            q, k = (1 + 0.2 * self._randn(count * case.head_dim) for count in counts)
            self.norms = HeadNorms(q.to(device), k.to(device), 1e-5, case.offset)
        self.sinks = 2 * self._randn(case.heads).to(device) if case.sinks else None

    def step(self, backend: Backend, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Queries [T, heads, d] and what attention makes of them [T, heads * d], for these sequences."""
        case = self.case
        present = [i for i, (_, length) in enumerate(spans) if length]
        rows = 0
        found = []
        for i in present:
            start, length = spans[i]
            found.append(Span(rows, length, start))
            rows += length
        tables = [self.tables[i] for i in present]
        plan = AttentionPlan(found, tables, case.block_size, self.device)
        qkv = self._randn(rows, case.heads + 2 * case.kv_heads, case.head_dim).to(self.device)
        pairs = case.rotated or case.head_dim // 2
        frequencies = 100.0 ** -torch.linspace(0, 1, pairs, device=self.device)
        angles = plan.positions[:, None, None] * frequencies
        rotation = Rotation(angles.cos(), angles.sin(), case.neighbours)
        backend.rope_store(qkv, self.norms, rotation, self.cache, plan)
        scores = Scores(case.window, case.scale, case.soft_cap, self.sinks)
        out = backend.paged_attention(qkv, self.cache, plan, scores)
        return qkv[:, : case.heads].cpu(), out.cpu()

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.case.dtype)


def run(backend: Backend, case: LayerCase, device: str = "cpu") -> list[Tensor]:
    """Queries and outputs of the step, and of one that decodes a token of every sequence after it."""
    layer = Layer(case, device)
    history = [(0, start) for start, _ in case.spans]
    if any(start for start, _ in case.spans):
        layer.step(backend, history)
    results = layer.step(backend, case.spans)
    return [*results, *layer.step(backend, [(start + length, 1) for start, length in case.spans])]


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for value, true in zip(found, expected, strict=True):
        assert value.dtype == true.dtype
        # Rounded queries and keys move a softmax with large scores by some percent, single values by more.
        tolerance = 1e-4 if true.dtype == torch.float32 else 0.1
        torch.testing.assert_close(value.float(), true.float(), rtol=tolerance, atol=tolerance)
        off = (value.float() - true.float()).abs() / (1 + true.float().abs())
        assert not true.numel() or off.mean() < tolerance / 5
