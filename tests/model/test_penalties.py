"""Penalties from step to step: what a step costs depends on its new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_cuda import FakeCuda

from aioengine.model.penalties import Penalties
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork

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


def row(history: list[int]) -> SequenceWork:
    return SequenceWork("r", -1, [0], len(history) - 1, [0], True, PARAMS, 0, history, 5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_that_follow_each_other_read_each_token_once(device: str) -> None:
    length, steps = 400, 20
    history, whole = Read(i % VOCAB for i in range(length)), Penalties()
    with FakeCuda():
        penalties = Penalties()
        for number in range(steps):
            history.count = 0
            scores = torch.ones(1, VOCAB).to(device)
            penalties.apply(scores, [row(history)])
            assert history.count <= (2 * length if number == 0 else 8)
            expected = torch.ones(1, VOCAB).to(device)
            whole.apply(expected, [row([*list.__iter__(history)])])  # another list each time: counted anew
            assert scores.tolist() == expected.tolist()
            history.append(7)


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
            Penalties().apply(
                scores, [msgspec.structs.replace(row, history=list(row.history)) for row in rows]
            )
            for mine, plain in zip(there.tolist(), scores.tolist(), strict=True):
                assert mine == pytest.approx(plain, rel=1e-6)
            for name in present:
                histories[name].append(data.draw(st.integers(0, VOCAB - 1)))
            if data.draw(st.booleans()):  # another request of the same id
                histories.pop(next(iter(present)))
