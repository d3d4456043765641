"""Decisions that are too slow, on a machine that may be busy."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.schedulers.overruns import FORGIVEN_AFTER, Overruns

BUDGET, MOST = 1e-3, 20
QUICK = BUDGET / 10


class Asked(Overruns):
    """Knows what time it is."""

    now = 0.0

    def ask(self, used: float = QUICK, waited: float = 0.0, *, after: float = 0.0) -> bool:
        """Count a decision that begins ``after`` the last one."""
        self.now += after + used + waited
        return self.add(used + waited, used)


def asked(overruns: Asked, times: int) -> bool:
    """Whether ``times`` quick decisions give no cause for complaint."""
    for _ in range(times):
        assert not overruns.ask()
        if overruns.complaint:
            return False
    return True


@given(
    share=st.floats(0, 0.3),
    longest=st.floats(BUDGET, 10.0),
    seed=st.integers(0, 10**6),
    stopped=st.floats(0, 10_000),
)
@pytest.mark.slow
def test_a_busy_machine_replaces_nothing(share: float, longest: float, seed: int, stopped: float) -> None:
    """However long the process waits for a processor in the middle of some decisions: it waits as long for
    each second that it computes between them. Once it is stopped, within a decision."""
    rng = random.Random(seed)
    overruns = Asked(BUDGET, MOST)

    def wait(seconds: float) -> float:
        """How long the process waits while it computes for ``seconds``."""
        times = int(seconds / QUICK)
        return sum(rng.uniform(0, longest) for _ in range(times) if rng.random() < share)

    for number in range(2000):
        between = rng.uniform(10, 30) * QUICK
        waited = stopped if number == 100 else wait(QUICK)
        assert not overruns.ask(waited=waited, after=between + wait(between))
        assert not overruns.complaint


@given(share=st.floats(0.7, 1), seed=st.integers(0, 10**6))
def test_what_waits_in_most_decisions_is_replaced(share: float, seed: int) -> None:
    rng = random.Random(seed)
    overruns = Asked(BUDGET, MOST)
    for _ in range(2000):
        assert not overruns.ask(waited=2 * BUDGET if rng.random() < share else 0, after=20 * BUDGET)
        if overruns.complaint:
            break
    assert overruns.complaint == "waited for more than 1 ms in most of its decisions"


@given(between=st.integers(0, FORGIVEN_AFTER - 1), waited=st.floats(0, 1))
@pytest.mark.slow
def test_what_computes_too_long_is_replaced(between: int, waited: float) -> None:
    overruns = Asked(BUDGET, MOST)
    for number in range(1, MOST + 1):
        assert overruns.ask(2 * BUDGET, waited)
        assert bool(overruns.complaint) is (number == MOST)
        if number < MOST:
            assert asked(overruns, between)
    assert overruns.complaint == f"took more than 1 ms {MOST} times"
