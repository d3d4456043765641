"""Logit bias and constraints in the sampler."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import sampler_rows

from aioengine.errors import RequestInvalid
from aioengine.model import constraints
from aioengine.model.sampler import sample
from aioengine.request import SamplingParams
from aioengine.step import OutputView, Sampled


class Allow:
    """Allows fixed tokens, and remembers what it was asked about."""

    def __init__(self, *tokens: int, width: int = 40) -> None:
        mask = bytearray(width)
        for token in tokens:
            mask[token // 8] |= 1 << token % 8
        self.mask = bytes(mask)
        self.asked: list[list[int]] = []

    def allowed(self, output: Sequence[int]) -> bytes:
        self.asked.append(list(output))
        return self.mask


class Broken:
    def allowed(self, output: Sequence[int]) -> bytes:
        raise ZeroDivisionError("oh")


class Late(Allow):
    """Has its answer when it is asked for the third time."""

    slow = False
    begun = polled = 0

    def begin(self, output: Sequence[int]) -> None:
        self.begun += 1

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        self.polled += 1
        self.seconds = seconds
        return self.mask if self.polled > 2 else None


row = partial(sampler_rows.row, history=[7, 8, 9])


def logits(rows: int, vocab: int = 300) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("vocab", [300, 301, 307])
def test_only_allowed_tokens_are_chosen(vocab: int) -> None:
    x = logits(60, vocab)
    constraint = Allow(0, 5, 299)
    greedy = sample(x, [row(SamplingParams(constraint=constraint))] * 60)
    assert [s.token for s in greedy] == [[0, 5, 299][i] for i in x[:, [0, 5, 299]].argmax(-1).tolist()]
    drawn = sample(
        x, [row(SamplingParams(temperature=3.0, constraint=constraint), seed=i) for i in range(60)]
    )
    assert {s.token for s in drawn} == {0, 5, 299}
    assert constraint.asked == [[8, 9]] * 120


def test_a_short_mask_bans_the_rest() -> None:
    [found] = sample(logits(1), [row(SamplingParams(constraint=Allow(3, width=1)))])
    assert found.token == 3


def test_what_fails_harms_only_itself() -> None:
    x = logits(4)
    clean = SamplingParams(temperature=1.0, logprobs=1)
    rows = [
        row(clean),
        row(SamplingParams(constraint=Allow(), logprobs=1)),
        row(SamplingParams(constraint=Broken(), temperature=1.0)),
        row(clean, seed=5),
    ]
    found = sample(x, rows)
    assert [s.fault for s in found[1:3]] == ["request", "request"]
    assert "no token" in (found[1].error or "") and "ZeroDivisionError: oh" in (found[2].error or "")
    assert found[1].logprob is None
    assert found[0] == sample(x[:1], rows[:1])[0]
    assert found[3] == sample(x[3:], rows[3:])[0]


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Raises(Allow):
    """Raises in each of its methods; ``forced`` is one of them."""

    slow = False

    def __init__(self, error: BaseException, where: str) -> None:
        super().__init__(3)
        self.error, self.where = error, where

    def at(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def begin(self, output: Sequence[int]) -> None:
        self.at("begin")

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        self.at("poll")
        return self.mask

    @property
    def forced(self) -> Sequence[int]:
        self.at("forced")
        return ()


@pytest.mark.parametrize("where", ["begin", "poll", "forced"])
@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), SystemExit(3), GeneratorExit(), NoText(), MemoryError()], ids=repr
)
def test_whatever_a_constraint_raises_fails_its_row_alone(error: BaseException, where: str) -> None:
    rows = [row(SamplingParams(constraint=Raises(error, where))), row(SamplingParams(constraint=Allow(5)))]
    constraints.begin(rows)
    bad, good = sample(logits(2), rows)
    assert good.token == 5 and good.error is None
    assert bad.token == (3 if where == "begin" else -1)
    assert where == "begin" or (bad.fault == "request" and type(error).__name__ in (bad.error or ""))


def sample_forced(forced: Any) -> tuple[Sampled, Sampled]:
    constraint = Allow(3)
    constraint.forced = forced  # type: ignore[attr-defined]
    found, other = sample(logits(2), [row(SamplingParams(constraint=constraint)), row(SamplingParams())])
    return found, other


@pytest.mark.parametrize("forced", [[-1], ["a"], [1.0], [logits(1).shape[1]], [1, 2**40], None, 7])
def test_forced_tokens_are_token_ids(forced: Any) -> None:
    bad, good = sample_forced(forced)
    assert bad.fault == "request" and bad.error and good.error is None


def test_forced_tokens_may_be_numbers_of_numpy() -> None:
    last = logits(1).shape[1] - 1
    found, _ = sample_forced(torch.tensor([1, last]).numpy())
    assert found.forced == (1, last) and {type(token) for token in found.forced} == {int}


@pytest.mark.parametrize("slow", [False, True])
def test_what_is_late_gets_no_token_and_nobody_waits_for_what_is_slow(slow: bool) -> None:
    late = Late(3, 5)
    late.slow = slow
    clean = SamplingParams(temperature=1.0)
    rows = [row(clean), row(SamplingParams(constraint=late, logprobs=1)), row(SamplingParams())]
    constraints.begin(rows)
    assert late.begun == 1
    for _ in range(2):
        found = sample(logits(3), rows)
        assert found[1] == Sampled(-1, late=True)
        assert late.seconds == 0 if slow else 0 < late.seconds <= constraints.PATIENCE_SECONDS
    now = sample(logits(3), rows)
    assert now[1].token in (3, 5) and now[1].logprob is not None
    assert [now[0], now[2]] == [found[0], found[2]] == sample(logits(3)[[0, 2]], [rows[0], rows[2]])


def test_a_step_with_nothing_else_waits_for_what_is_late() -> None:
    late = Late(3)
    late.slow = True
    assert sample(logits(1), [row(SamplingParams(constraint=late))])[0].late
    assert late.seconds == constraints.ALONE_SECONDS


def test_bias_is_added_before_the_choice_and_not_to_logprobs() -> None:
    x = logits(2)
    best = int(x[0].argmax())
    [banned, plain] = sample(
        x[[0, 0]],
        [row(SamplingParams(logit_bias={best: -100.0}, logprobs=1)), row(SamplingParams(logprobs=1))],
    )
    assert banned.token == int(x[0].topk(2).indices[1])
    assert banned.logprob is not None and plain.logprob is not None
    assert banned.logprob.top == plain.logprob.top
    forced = sample(x, [row(SamplingParams(logit_bias={17: 100.0}, temperature=1.0), seed=i) for i in (1, 2)])
    assert [s.token for s in forced] == [17, 17]
    # exactly to the edge
    gap = float(x[0, best] - x[0, 17])
    for extra, expected in ((-0.01, best), (0.01, 17)):
        [found] = sample(x[:1], [row(SamplingParams(logit_bias={17: gap + extra}))])
        assert found.token == expected


def test_ids_beyond_the_vocabulary_are_no_bias() -> None:
    assert sample(logits(1), [row(SamplingParams(logit_bias={10**6: 5.0}))]) == sample(
        logits(1), [row(SamplingParams())]
    )


@pytest.mark.parametrize(
    "bias", [{-1: 1.0}, {1: 101.0}, {1: float("nan")}, {"x": 1.0}, {True: 1.0}, [1], {1: "a"}, {1.5: 1.0}]
)
def test_bad_bias_is_refused(bias: Any) -> None:
    with pytest.raises(RequestInvalid, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_bias_keys_may_be_text_as_in_json() -> None:
    assert SamplingParams(logit_bias={"12": 1}).logit_bias == {12: 1}  # type: ignore[dict-item]


def test_a_constraint_has_a_method() -> None:
    with pytest.raises(RequestInvalid, match="constraint"):
        SamplingParams(constraint={"regex": "a"})  # type: ignore[arg-type]


PLACES = st.none() | st.integers(-12, 12)
TOKENS = st.lists(st.integers(0, 3), max_size=6)


@given(TOKENS, TOKENS, TOKENS, TOKENS, st.builds(slice, PLACES, PLACES, st.sampled_from([None, 1, 2, -1])))
def test_a_view_reads_like_a_copy(
    prompt: list[int], output: list[int], draft: list[int], other: list[int], part: slice
) -> None:
    history = [*prompt, *output]
    copy = [*output, *draft]
    view = OutputView(history, len(prompt), draft)
    for _ in range(2):
        assert (len(view), list(view), view[part]) == (len(copy), copy, copy[part])
        assert view == copy == view and view == tuple(copy) and (view == other) == (copy == other)
        for place in range(-len(copy), len(copy)):
            assert view[place] == copy[place]
        for place in (len(copy), -len(copy) - 1):
            with pytest.raises(IndexError):
                _ = view[place]
        for first in (other, copy[: len(other)]):
            assert view.begins_with(OutputView(first)) == (copy[: len(first)] == first)
        history += [9, 9]  # what comes later
    later = OutputView(history, len(prompt), draft)
    expected = [*history[len(prompt) :], *draft]
    assert later.begins_with(view) == (expected[: len(copy)] == copy)
