"""Penalties from step to step: what a step costs depends on its new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

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


def test_steps_that_follow_each_other_read_each_token_once() -> None:
    length, steps = 400, 20
    history, whole, penalties = Read(i % VOCAB for i in range(length)), Penalties(), Penalties()
    for number in range(steps):
        history.count = 0
        scores, expected = torch.ones(1, VOCAB), torch.ones(1, VOCAB)
        penalties.apply(scores, [row(history)])
        assert history.count <= (2 * length if number == 0 else 8)
        whole.apply(expected, [row([*list.__iter__(history)])])  # another list each time: counted anew
        assert torch.equal(scores, expected)
        history.append(7)
