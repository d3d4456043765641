"""Draws that the most likely tokens do not decide: a CPU finds them without a sort of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_cuda import FakeCuda
from support.sampler_rows import row, tokens

from aioengine.request import SamplingParams

VOCAB = 20000


FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.0, 50.0]),
    top_k=st.sampled_from([0, 0, 1, 65, 700, 3000, 30000]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.9999999]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.05, 1.0]),
)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    params=st.lists(FILTERS, min_size=8, max_size=8),
    spread=st.sampled_from([0.0, 1e-6, 0.3, 3.0, 10.0]),
    grain=st.sampled_from([0.0, 0.5, 2.0]),
    banned=st.sampled_from([0.0, 0.3, 0.97]),
    huge=st.sampled_from([0.0, 15.0, 3e38]),
    seed=st.integers(0, 2**64 - 1),
)
@pytest.mark.slow
def test_tokens_are_those_of_a_gpu(
    params: Sequence[SamplingParams], spread: float, grain: float, banned: float, huge: float, seed: int
) -> None:
    """A GPU sorts the whole row."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    logits = torch.randn(len(params), VOCAB, generator=generator) * spread
    if grain:  # many equals
        logits = (logits / grain).round() * grain
    logits[torch.rand(logits.shape, generator=generator) < banned] = -math.inf
    logits[:, seed % VOCAB] = huge
    rows = [row(each, seed=seed + i) for i, each in enumerate(params)]
    with FakeCuda():
        expected = tokens(logits.to("cuda"), rows)
    assert tokens(logits, rows) == expected


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_scores_that_have_become_infinite_give_the_same_token_too(top_p: float) -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3)) + 10
    penalty = SamplingParams(temperature=2.0, top_p=top_p, repetition_penalty=1e-40)
    no_end = SamplingParams(temperature=2.0, top_p=top_p, min_tokens=2, stop_token_ids=list(range(VOCAB)))
    rows = [row(penalty, seed=1, history=[77]), row(no_end, seed=2)]
    with FakeCuda():
        expected = tokens(logits.to("cuda"), rows)
    assert tokens(logits, rows) == expected
    assert expected[0] == 77


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5000}, {"min_p": 0.01}])
def test_few_tokens_are_sorted(monkeypatch: pytest.MonkeyPatch, options: dict[str, float]) -> None:
    sorts: list[int] = []
    true = torch.Tensor.sort

    def sort(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        sorts.append(self.numel())
        return true(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.Tensor, "sort", sort)
    params = SamplingParams(temperature=2.0, **options)  # type: ignore[arg-type]
    logits = torch.randn(32, VOCAB, generator=torch.Generator().manual_seed(1))
    drawn = tokens(logits, [row(params, seed=seed) for seed in range(32)])
    assert len(set(drawn)) > 16, "flat"
    assert sum(sorts) < 32 * VOCAB / 4
