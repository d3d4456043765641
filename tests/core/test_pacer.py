"""What is learned from the times of steps."""

from __future__ import annotations

import math

import pytest

from aioengine.core.pacing import Pacer, StepWork


@pytest.mark.parametrize(("first", "second", "share"), [(0.8, 0.8, 0.4), (0.8, 0.97, 0.2), (0.97, 0.8, 0.2)])
def test_more_is_learned_of_a_fall_only_if_it_follows_another(
    first: float, second: float, share: float
) -> None:
    """What is less than a tenth below may be noise."""
    pacer, work = Pacer(0.2, 1 / 3000), StepWork(tokens=256)
    for _ in range(100):
        pacer.learn(work, 0.1)
    pacer.learn(work, pacer.seconds(work) * first)
    before = pacer.seconds(work)
    pacer.learn(work, before * second)
    assert math.log(pacer.seconds(work) / before) == pytest.approx(share * math.log(second), rel=0.15)
