"""Penalties from step to step: what a step costs depends on its new tokens, overlapped or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_cuda import FakeCuda

from aioengine.model.penalties import Penalties
from aioengine.request import SamplingParams
from aioengine.step import UNKNOWN, FollowedHistory, Sampled, SequenceWork, StepBatch, same_history

VOCAB = 64
PARAMS = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1)


class Read(list[int]):
    """A history that counts the tokens that are read of it."""

    count = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.count += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.count += len(self)
        return super().__iter__()


def step(history: list[int], start: int, *, follows: bool) -> StepBatch:
    tokens = [UNKNOWN] if follows else [0]
    work = SequenceWork("r", -1, tokens, start, [0], True, PARAMS, 0, history, 5)
    return StepBatch(start, [work], [], follows=follows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_that_follow_each_other_read_each_token_once(device: str) -> None:
    length, steps = 400, 20
    history, whole = Read(i % VOCAB for i in range(length)), Penalties()
    with FakeCuda():
        penalties, batch = Penalties(), step(history, length - 1, follows=False)
        for number in range(steps):
            history.count = 0
            scores = torch.ones(1, VOCAB).to(device)
            penalties.apply(scores, batch.sequences)
            assert history.count <= (2 * length if number == 0 else 8)
            known = [*list.__iter__(history), 7][: length + number]
            expected, work = torch.ones(1, VOCAB).to(device), batch.sequences[0]._replace(history=known)
            whole.apply(expected, [work])  # another list each time: it is counted anew
            assert scores.tolist() == expected.tolist()
            # The next step is formed before the owner adds the token, and runs before or after that.
            following = step(history, length + number, follows=True)
            if number % 2:
                history.append(7)
            batch = following.after(batch.sequences, [Sampled(7)])
            if not number % 2:
                history.append(7)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 12), st.integers(0, 9), st.data())
def test_it_is_the_list_that_it_stands_for(
    base: list[int], length: int, token: int, data: st.DataObject
) -> None:
    length = min(length, len(base))
    view, plain = FollowedHistory(base, length, token), [*base[:length], token]
    base.append(99)  # its owner adds to it
    assert list(view) == plain and len(view) == len(plain)
    indices = st.none() | st.integers(-15, 15)
    cut = slice(data.draw(indices), data.draw(indices), data.draw(st.sampled_from([None, 1, 2, -1])))
    assert view[cut] == plain[cut]
    for i in (*range(-len(plain), len(plain)),):
        assert view[i] == plain[i]
    for i in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            view[i]
    assert same_history(view, base) and same_history(base, FollowedHistory(base, 0, 1))
    assert not same_history(view, [*base])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=8), st.data())
@pytest.mark.slow
def test_requests_that_come_go_and_change_places(steps: list[set[int]], data: st.DataObject) -> None:
    """What stays on the device from step to step is that of these requests and parameters, or sent anew."""
    histories: dict[int, list[int]] = {}
    choices = [PARAMS, SamplingParams(repetition_penalty=0.5), SamplingParams(presence_penalty=1.0)]
    params: dict[int, SamplingParams] = {}
    with FakeCuda():
        penalties = Penalties(2)
        for present in steps:
            rows = []
            for name in data.draw(st.permutations(sorted(present))):
                known = histories.setdefault(name, [name, 3, name])
                if name not in params or data.draw(st.booleans()):
                    params[name] = data.draw(st.sampled_from(choices))
                rows.append(SequenceWork(str(name), -1, [0], 0, [0], True, params[name], 0, known, 2))
            scores = torch.linspace(-2, 2, len(rows) * VOCAB).view(-1, VOCAB)
            there = scores.to("cuda")
            penalties.apply(there, rows)
            Penalties().apply(scores, [row._replace(history=list(row.history)) for row in rows])
            for mine, plain in zip(there.tolist(), scores.tolist(), strict=True):
                assert mine == pytest.approx(plain, rel=1e-6)
            for name in present:
                histories[name].append(data.draw(st.integers(0, VOCAB - 1)))
            if data.draw(st.booleans()):  # another request of the same id
                histories.pop(next(iter(present)))
