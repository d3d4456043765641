from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampler_rows import row, tokens

from aioengine.model import sampler
from aioengine.model.penalties import Penalties
from aioengine.model.sampler import sample, uniform
from aioengine.request import SamplingParams

VOCABULARIES = (7, 100, 20000)  # below, around and beyond the sampler's block and candidate counts


def ranked(scores: Sequence[float], params: SamplingParams) -> list[tuple[int, float]]:
    """Slow oracle: (token, weight) that the filters keep, most likely first."""
    top = max(scores)
    weights = [(i, math.exp((s - top) / params.temperature)) for i, s in enumerate(scores)]
    weights.sort(key=lambda pair: (-pair[1], pair[0]))
    if params.top_k:
        weights = weights[: params.top_k]
    total, before, kept = sum(w for _, w in weights), 0.0, []
    for token, weight in weights:
        if kept and params.top_p < 1.0 and before >= params.top_p * total:
            break
        kept.append((token, weight))
        before += weight
    return [(t, w) for t, w in kept if w >= params.min_p * kept[0][1]]


def draw(kept: Sequence[tuple[int, float]], u: float) -> tuple[int, float]:
    """The oracle's token, and how far ``u`` is from the edge of the token's interval."""
    total, end = sum(w for _, w in kept), 0.0
    for token, weight in kept:
        start, end = end, end + weight / total
        if u < end:
            return token, min(u - start, end - u) if len(kept) > 1 else 1.0
    return kept[-1][0], 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = logits.clone()
    greedy = SamplingParams()
    assert tokens(logits, [row(greedy)] * 5) == logits.argmax(-1).tolist()
    # ... also beside rows that take the long way
    mixed = [row(greedy) if i % 2 else row(SamplingParams(temperature=1.0)) for i in range(5)]
    assert tokens(logits, mixed)[1::2] == logits.argmax(-1).tolist()[1::2]
    assert torch.equal(logits, before)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    vocab=st.sampled_from(VOCABULARIES),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 64.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 63, 64, 65, 700, 3000, 30000]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.9999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    banned=st.sampled_from([0.0, 0.0, 0.3, 0.97]),
    seed=st.integers(-(2**63), 2**64 - 1),
)
@pytest.mark.slow
def test_filters_agree_with_a_slow_oracle(
    vocab: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    # Multiples of 1/2: many exact ties, and divisions by the temperatures are exact.
    logits = (torch.randn(1, vocab, generator=generator) * spread * 2).round() / 2
    logits[torch.rand(logits.shape, generator=generator) < banned] = -math.inf
    logits[:, seed % vocab] = 0.0
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = ranked(logits[0].tolist(), params)
    expected, margin = draw(kept, uniform(seed, 0))
    actual = tokens(logits, [row(params, seed=seed)])[0]
    if margin > 1e-6:  # closer to an edge, float32 may round to the other side
        assert actual == expected
    else:
        assert actual in dict(kept)


def test_a_score_that_has_become_infinite_is_the_most_likely() -> None:
    logits = torch.randn(1, 20000, generator=torch.Generator().manual_seed(3)) + 10
    params = SamplingParams(temperature=2.0, top_p=0.9, repetition_penalty=1e-40)
    assert tokens(logits, [row(params, seed=1, history=[77])]) == [77]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5000}, {"min_p": 0.01}])
def test_few_tokens_are_sorted(monkeypatch: pytest.MonkeyPatch, options: dict[str, float]) -> None:
    """A CPU finds a draw that the most likely tokens do not decide without a sort of the vocabulary."""
    sorts: list[int] = []
    true = torch.Tensor.sort

    def sort(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        sorts.append(self.numel())
        return true(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.Tensor, "sort", sort)
    params = SamplingParams(temperature=2.0, **options)  # type: ignore[arg-type]
    logits = torch.randn(32, 20000, generator=torch.Generator().manual_seed(1))
    drawn = tokens(logits, [row(params, seed=seed) for seed in range(32)])
    assert len(set(drawn)) > 16, "flat"
    assert sum(sorts) < 32 * 20000 / 4


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.9}]
)
@pytest.mark.slow
def test_distribution(options: dict[str, float]) -> None:
    """Pearson's chi-square over 20,000 seeds stays below the 99.9% quantile."""
    params = SamplingParams(temperature=1.3, **options)  # type: ignore[arg-type]
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    n = 20000
    drawn = tokens(scores.expand(n, -1), [row(params, seed=seed) for seed in range(n)])
    kept = dict(ranked(scores[0].tolist(), params))
    assert set(drawn) <= set(kept)
    total = sum(kept.values())
    chi2 = sum((drawn.count(t) - n * w / total) ** 2 / (n * w / total) for t, w in kept.items())
    freedom = len(kept) - 1  # quantile by Wilson and Hilferty's approximation
    assert chi2 < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_uniform_is_uniform_over_seeds_and_over_indices() -> None:
    for draws in ([uniform(s, 0) for s in range(4000)], [uniform(7, i) for i in range(4000)]):
        assert abs(sum(draws) / 4000 - 0.5) < 0.02
        assert all(abs(sum(lo <= u < lo + 0.1 for u in draws) - 400) < 90 for lo in (0.0, 0.5, 0.9))
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    logits = torch.randn(24, 20000, generator=torch.Generator().manual_seed(5)).to(dtype)
    kinds = [
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.0, top_k=40),
        SamplingParams(temperature=1.0, top_k=3000, top_p=0.9),
        SamplingParams(temperature=0.9, top_p=0.95),
        SamplingParams(temperature=0.9, min_p=0.05, repetition_penalty=1.2),
        SamplingParams(logprobs=3),
    ]
    rows = [row(kinds[i % 6], seed=i, history=list(range(i + 2)), prompt_len=2) for i in range(24)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(24)]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(6)).tolist()
    assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_draw_depends_on_seed_and_output_index_only() -> None:
    logits = torch.zeros(1, 20000)
    params = SamplingParams(temperature=1.0)

    def token(seed: int, prompt: int, output: int) -> int:
        history = [1] * (prompt + output)
        return tokens(logits, [row(params, seed=seed, history=history, prompt_len=prompt)])[0]

    assert token(3, 5, 2) == token(3, 9, 2)
    assert len({token(3, 5, i) for i in range(20)}) > 15
    assert len({token(s, 5, 0) for s in range(20)}) > 15


def test_draws_on_the_edge_between_two_tokens_do_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which side of an edge a draw is on depends on the last bits of the row's sum, of very many tokens."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 2**16, generator=generator)
    weights = (logits[0] - logits.max()).exp().double().sort(descending=True).values
    sums = weights.cumsum(0) / weights.sum()
    edges = [*sums[:40].tolist(), *sums[1000::9000].tolist()]
    monkeypatch.setattr(sampler, "uniform", lambda seed, index: edges[seed])
    params, threads = SamplingParams(temperature=1.0), torch.get_num_threads()
    rows = [row(params, seed=seed) for seed in range(len(edges))]
    try:
        torch.set_num_threads(2)
        together = tokens(logits.expand(len(rows), -1).contiguous(), rows)
        assert [tokens(logits, [one])[0] for one in rows] == together
        torch.set_num_threads(1)
        assert [tokens(logits, [one])[0] for one in rows] == together
    finally:
        torch.set_num_threads(threads)


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 100
    params = SamplingParams(temperature=1e-300)
    assert tokens(logits, [row(params, seed=s) for s in range(4)]) == logits.argmax(-1).tolist()


def test_penalties_by_hand() -> None:
    # prompt: 0, 1; output: 2, 2, 3. Raising one logit shows on which side of the best it was.
    history, prompt_len = [0, 1, 2, 2, 3], 2
    base = [2.0, -2.0, 4.0, 1.0, 0.5]

    def best(bump: dict[int, float], **options: float) -> int:
        scores = torch.tensor([[v + bump.get(i, 0.0) for i, v in enumerate(base)]])
        params = SamplingParams(**options)  # type: ignore[arg-type]
        return tokens(scores, [row(params, history=history, prompt_len=prompt_len)])[0]

    # repetition 2: 2->1, -2->-4, 4->2, 1->0.5, 0.5 stays: token 4 wins only above 2.
    assert best({}, repetition_penalty=2.0) == 2
    assert best({4: 1.49}, repetition_penalty=2.0) == 2
    assert best({4: 1.51}, repetition_penalty=2.0) == 4
    # presence 1.5 and frequency 0.5, outputs only: 4 -> 4 - 1.5 - 2 * 0.5 = 1.5; prompt's 2 stays.
    assert best({}, presence_penalty=1.5, frequency_penalty=0.5) == 0
    assert best({2: 0.49}, presence_penalty=1.5, frequency_penalty=0.5) == 0
    assert best({2: 0.51}, presence_penalty=1.5, frequency_penalty=0.5) == 2
    # 1 -> 1 - 1.5 - 0.5 = -1 for token 3: it wins only when raised by more than 3.
    assert best({3: 2.99}, presence_penalty=1.5, frequency_penalty=0.5) == 0
    assert best({3: 3.01}, presence_penalty=1.5, frequency_penalty=0.5) == 3
    # repetition comes first: 4 / 2 - 1 = 1 against the prompt's 2 / 2 = 1; +0.1 / 2 decides.
    assert best({2: 0.1, 4: -9, 3: -9}, repetition_penalty=2.0, frequency_penalty=0.5) == 2
    assert best({0: 0.1, 4: -9, 3: -9}, repetition_penalty=2.0, frequency_penalty=0.5) == 0


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(8))
    params = SamplingParams(temperature=2.0, repetition_penalty=1.5, logprobs=3, top_k=10)
    expected = logits.log_softmax(-1)
    for i, result in enumerate(sample(logits, [row(params, seed=1), row(params, seed=2)])):
        assert result.logprob is not None
        assert result.logprob.token_id == result.token
        assert result.logprob.logprob == pytest.approx(expected[i, result.token].item(), abs=1e-5)
        values, ids = expected[i].topk(3)
        assert [t for t, _ in result.logprob.top] == ids.tolist()
        assert [v for _, v in result.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    none = sample(logits, [row(SamplingParams(logprobs=0)), row(SamplingParams())])
    assert none[0].logprob is not None
    assert none[0].logprob.top == ()
    assert none[1].logprob is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}])
def test_a_bad_row_harms_only_itself(bad: float, options: dict[str, float]) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(9))
    params = SamplingParams(**options)  # type: ignore[arg-type]
    rows = [row(params, seed=s) for s in range(3)]
    clean = sample(logits, rows)
    if bad == -math.inf:
        logits[1] = bad
    else:
        logits[1, 123] = bad
    results = sample(logits, rows)
    assert results[1].error is not None
    assert results[1].logprob is None
    assert [results[0], results[2]] == [clean[0], clean[2]]


@given(st.data())
@pytest.mark.slow
def test_penalties_kept_from_step_to_step_are_those_of_the_whole_history(data: st.DataObject) -> None:
    vocab = 12
    ids = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=8)
    number = st.floats(0.5, 2.0)
    penalties = Penalties()
    rows = [
        dataclasses.replace(
            row(
                SamplingParams(
                    repetition_penalty=data.draw(number),
                    presence_penalty=data.draw(number),
                    frequency_penalty=data.draw(number),
                ),
                history=(prompt := data.draw(ids)),
                prompt_len=len(prompt),
            ),
            request_id=str(i),
        )
        for i in range(3)
    ]
    for _ in range(data.draw(st.integers(1, 5))):
        running = data.draw(st.lists(st.sampled_from(rows), unique_by=id, max_size=3))
        scores = torch.randn(len(running), vocab)
        kept, anew = scores.clone(), scores.clone()
        penalties.apply(kept, running)
        Penalties().apply(anew, [dataclasses.replace(work, history=list(work.history)) for work in running])
        assert torch.equal(kept, anew)
        for work in rows:
            work.history.extend(data.draw(ids))  # type: ignore[attr-defined]
