"""What is learned from the times of steps."""

from __future__ import annotations

import math
import random

import pytest

from aioengine.core.pacing import Pacer, StepWork


@pytest.mark.parametrize(
    ("noise", "first", "second", "share"),
    [(0.0, 0.8, 0.8, 0.4), (0.0, 0.8, 0.97, 0.2), (0.0, 0.97, 0.8, 0.2), (0.3, 0.8, 0.8, 0.2)],
)
def test_more_is_learned_of_a_fall_only_if_it_follows_another(
    noise: float, first: float, second: float, share: float
) -> None:
    """What is less than a tenth below may be noise, and also more where times vary more."""
    draw = random.Random(0)
    pacer, work = Pacer(0.2, 1 / 3000), StepWork(tokens=256)
    for _ in range(300):
        pacer.learn(work, 0.1 * math.exp(draw.gauss(0.0, noise)))
    pacer.learn(work, pacer.seconds(work) * first)
    before = pacer.seconds(work)
    pacer.learn(work, before * second)
    assert math.log(pacer.seconds(work) / before) == pytest.approx(share * math.log(second), rel=0.15)
