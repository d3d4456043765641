"""The Triton kernels sum a token's parts in one order, whatever it is computed with.

In Triton's interpreter, or on a GPU, as ``test_triton_ops.py``; ``test_triton.py`` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from support.lora_cases import Case, make_case
from support.triton_here import DEVICE, needs_triton
from torch import Tensor

from aioengine.kernels import AttentionPlan, LayerCache, LoRABatch, Scores, Span

lora = pytest.importorskip("aioengine.kernels.triton.lora")
attention = pytest.importorskip("aioengine.kernels.triton.attention")
pytestmark = needs_triton
ALONE, SHARED = 10**9, 0
"""Programs from which on a launch is large enough: parts go to many programs, or to one."""
DTYPES = [torch.float32, torch.bfloat16]


def adapted(case: Case, batch: LoRABatch, first: int, last: int) -> tuple[Tensor, Tensor]:
    """h and y of tokens ``first..last - 1`` of a case, as this batch."""
    x, y = case.x[first:last].to(DEVICE), case.y[first:last].to(DEVICE)
    pool = case._replace(a=case.a.to(DEVICE)).pool
    h = lora.lora_shrink(x, pool, batch)
    lora.lora_expand(h, pool, y, batch)
    widest = torch.zeros(len(x), len(case.b), 64, dtype=h.dtype)
    widest[:, :, : h.shape[2]] = h
    return widest, y.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_parts_of_inputs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a prompt's tiles and in decoding's, with parts in one program and in many."""
    sequences = [(-1, 3), (0, 1), (1, 5), (3, 37)]
    case = make_case(sequences, [20, 8, 1, 33], 64, n_in=1100, dtype=dtype)
    monkeypatch.setattr(lora, "_PROGRAMS", SHARED)
    whole = adapted(case, case.batch, 0, len(case.x))
    monkeypatch.setattr(lora, "_PROGRAMS", ALONE)
    assert all(
        torch.equal(a, b) for a, b in zip(adapted(case, case.batch, 0, len(case.x)), whole, strict=True)
    )
    for token in (3, 5, 45):
        for programs in (SHARED, ALONE):
            alone = LoRABatch([case.slot_of_token[token]], [1], case.ranks, DEVICE)
            monkeypatch.setattr(lora, "_PROGRAMS", programs)
            found = adapted(case, alone, token, token + 1)
            assert all(torch.equal(a[0], b[token]) for a, b in zip(found, whole, strict=True)), token


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 700])
def test_attentions_parts_of_keys(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, kv_heads, d, block, length = 4, 2, 16, 16, 12
    starts = (1020, 5, 505)
    generator = torch.Generator().manual_seed(0)
    width = (max(starts) + length) // block + 1
    shape = (len(starts) * width, block, kv_heads, d)
    cache = LayerCache(*(torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for _ in range(2)))
    rows = torch.randn(len(starts) * length, heads + 2 * kv_heads, d, generator=generator).to(dtype)
    rows = 2 * rows.to(DEVICE)
    tables = [list(range(i * width, (i + 1) * width)) for i in range(len(starts))]

    def attend(spans: list[Span], which: list[int], qkv: Tensor) -> Tensor:
        plan = AttentionPlan(spans, [tables[i] for i in which], block, DEVICE)
        out: Tensor = attention.paged_attention(qkv.contiguous(), cache, plan, Scores(window))
        return out.cpu()

    spans = [Span(i * length, length, start) for i, start in enumerate(starts)]
    whole = attend(spans, list(range(len(starts))), rows)
    for i, at in ((0, 0), (0, 11), (1, 7), (2, 6), (2, 7), (2, 11)):
        row = i * length + at
        for programs in (SHARED, ALONE):
            monkeypatch.setattr(attention, "_PROGRAMS", programs + 1)
            found = attend([Span(0, 1, starts[i] + at)], [i], rows[row : row + 1])
            assert torch.equal(found[0], whole[row]), (i, at)
