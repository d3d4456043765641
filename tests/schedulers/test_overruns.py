"""Decisions that are too slow, on a machine that may be busy."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from aioengine.schedulers.overruns import FORGIVEN_AFTER, Overruns

BUDGET, MOST = 1e-3, 20
QUICK = BUDGET / 10


def asked(overruns: Overruns, times: int) -> bool:
    """Whether ``times`` quick decisions give no cause for complaint."""
    for _ in range(times):
        assert not overruns.add(QUICK, QUICK)
        if overruns.complaint:
            return False
    return True


@given(
    share=st.floats(0, 0.3),
    longest=st.floats(BUDGET, 10.0),
    seed=st.integers(0, 10**6),
)
def test_a_busy_machine_replaces_nothing(share: float, longest: float, seed: int) -> None:
    """However long the process waits for a processor in the middle of some decisions."""
    rng = random.Random(seed)
    overruns = Overruns(BUDGET, MOST)
    for _ in range(2000):
        waited = rng.uniform(0, longest) if rng.random() < share else 0.0
        assert not overruns.add(QUICK + waited, QUICK)
        assert not overruns.complaint


@given(share=st.floats(0.7, 1), seed=st.integers(0, 10**6))
def test_what_waits_in_most_decisions_is_replaced(share: float, seed: int) -> None:
    rng = random.Random(seed)
    overruns = Overruns(BUDGET, MOST)
    for _ in range(2000):
        assert not overruns.add(QUICK + (2 * BUDGET if rng.random() < share else 0), QUICK)
        if overruns.complaint:
            break
    assert overruns.complaint == "waited for more than 1 ms in most of its decisions"


@given(between=st.integers(0, FORGIVEN_AFTER - 1), waited=st.floats(0, 1))
def test_what_computes_too_long_is_replaced(between: int, waited: float) -> None:
    overruns = Overruns(BUDGET, MOST)
    for number in range(1, MOST + 1):
        assert overruns.add(2 * BUDGET + waited, 2 * BUDGET)
        assert bool(overruns.complaint) is (number == MOST)
        if number < MOST:
            assert asked(overruns, between)
    assert overruns.complaint == f"took more than 1 ms {MOST} times"


def test_a_few_among_many_are_forgiven() -> None:
    overruns = Overruns(BUDGET, MOST)
    for _ in range(3 * MOST):
        assert overruns.add(2 * BUDGET, 2 * BUDGET)
        assert asked(overruns, FORGIVEN_AFTER)
