"""A policy that is slow, or meddles with what it was given, does not stop the engine."""

from __future__ import annotations

from collections import UserList, deque
from collections.abc import Callable
from typing import Any

import pytest

from aioengine import events
from aioengine.core import Core
from aioengine.schedulers import Decision, Place, SchedulerPolicy, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim


class Slow(SchedulerPolicy):
    """Takes as long as it is told, on a clock that is not real."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.takes = 0.0
        self.calls = 0

    def schedule(self, view: SchedulerView) -> Decision:
        self.calls += 1
        self.clock += self.takes
        return FCFS().schedule(view)._replace()


def slow_sim(max_overruns: int) -> tuple[Sim, Slow]:
    policy = Slow()
    limits = LIMITS._replace(policy_time_budget=0.01, policy_max_overruns=max_overruns)
    sim = Sim(limits, policy, strict=False)
    sim.core = Core(limits, policy, timer=lambda: policy.clock)
    return sim, policy


def test_overruns_are_counted_and_then_the_safe_policy_takes_over() -> None:
    sim, policy = slow_sim(max_overruns=3)
    sim.add(max_tokens=20)
    policy.takes = 0.02
    sim.run()
    assert sim.ended == {"r1": "length"}
    assert policy.calls == 3
    overruns = sim.of(events.PolicyOverran)
    assert [round(e.seconds, 6) for e in overruns] == [0.02] * 3  # type: ignore[attr-defined]
    (replaced,) = sim.of(events.PolicyReplaced)
    assert "Slow took more than 10 ms 3 times" in replaced.reason  # type: ignore[attr-defined]


COLLECTIONS: dict[str, Callable[[list[str]], Any]] = {
    "a deque": deque,
    "a UserList": UserList,
    "keys": lambda names: dict.fromkeys(names).keys(),
    "a set": set,
}


@pytest.mark.parametrize("case", COLLECTIONS)
def test_a_field_may_be_any_collection(case: str) -> None:
    class Collects(SchedulerPolicy):
        def schedule(self, view: SchedulerView) -> Decision:
            return Decision(admit=COLLECTIONS[case]([request.request_id for request in view.waiting]))

    sim = Sim(policy=Collects())
    for _ in range(3):
        sim.add()
    sim.run()
    assert set(sim.ended.values()) == {"length"} and not sim.of(events.PolicyFailed)


class _NoHash(str):
    def __hash__(self) -> int:
        raise RuntimeError("hash")


class _NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("str")


def _raise_without_text(view: SchedulerView) -> Decision:
    raise _NoText


ANSWERS: dict[str, Callable[[SchedulerView], Decision]] = {
    "ids that cannot be looked up": lambda view: Decision(
        admit=[_NoHash(r.request_id) for r in view.waiting], place=[Place(_NoHash("a"))]
    ),
    "reasons and requests that cannot be looked up": lambda view: Decision(
        reject=[(_NoHash("none"), _NoHash("because"))], preempt=[_NoHash("none")]
    ),
    "an error without a text": _raise_without_text,
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_a_policy_returns_may_raise_later(case: str) -> None:
    class Odd(SchedulerPolicy):
        calls = 0

        def schedule(self, view: SchedulerView) -> Decision:
            self.calls += 1
            return ANSWERS[case](view) if self.calls % 2 else FCFS().schedule(view)

    sim = Sim(policy=Odd(), strict=False)
    sim.register("a")
    for name in (None, "a"):
        sim.add(name)
    sim.run()
    assert set(sim.ended.values()) == {"length"}


@pytest.mark.parametrize("until", ["later", 1j, object(), True, float("nan")])
def test_a_time_to_ask_again_that_is_no_time_is_the_policy_s_failure(until: Any) -> None:
    class Odd(SchedulerPolicy):
        def schedule(self, view: SchedulerView) -> Decision:
            return FCFS().schedule(view)._replace(ask_again=until)

    sim = Sim(policy=Odd(), strict=False)
    sim.add(max_tokens=5)
    sim.run()
    assert sim.ended == {"r1": "length"}
    failed = sim.of(events.PolicyFailed)
    assert failed and "ask_again" in failed[0].error  # type: ignore[attr-defined]
