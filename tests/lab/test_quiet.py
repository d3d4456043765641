"""A policy that says until when it has nothing to add is asked then, or when something happens.

``test_several_steps.py`` compares runs with those of policies that are always asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from support.asked_always import AskedAlways

from aioengine import events
from aioengine.core import CoreLimits
from aioengine.core.state import Status
from aioengine.schedulers import Decision, Place, SchedulerPolicy, SchedulerView
from aioengine.testing import LIMITS, Sim


class Sleeps(SchedulerPolicy):
    """Admits what waits when it is first asked, and says until when it has nothing to add."""

    def __init__(self, until: float | None) -> None:
        self.until = until
        self.asked: list[float] = []

    def schedule(self, view: SchedulerView) -> Decision:
        self.asked.append(view.now)
        waiting = [request.request_id for request in view.waiting] if len(self.asked) == 1 else []
        return Decision(admit=waiting, ask_again=self.until)


def test_it_is_asked_again_at_its_time_or_when_something_happens() -> None:
    policy = Sleeps(until=0.5)
    sim = Sim(LIMITS._replace(num_blocks=200), policy)
    sim.add(max_tokens=50)
    for _ in range(4):
        sim.settle(step_seconds=0.1)
    assert len(policy.asked) == 1, "the request that it admits, and its tokens, are no event"
    sim.add(max_tokens=2)
    sim.settle(step_seconds=0.1)
    assert policy.asked[-1] == pytest.approx(0.4), "a request has come"
    for _ in range(3):
        sim.settle(step_seconds=0.1)
    assert policy.asked[-1] == pytest.approx(0.7), "its time has come, and it says no other"


def test_without_a_time_it_is_asked_before_every_step() -> None:
    policy = Sleeps(until=None)
    sim = Sim(LIMITS, policy)
    sim.add(max_tokens=10)
    sim.run()
    assert len(policy.asked) >= 10


class StartsOneAfterTheOther(SchedulerPolicy):
    """Admits the first request, and then all; the core cannot start the second one at once."""

    def __init__(self) -> None:
        self.asked = 0

    def schedule(self, view: SchedulerView) -> Decision:
        self.asked += 1
        waiting = [request.request_id for request in view.waiting]
        first = self.asked == 1
        return Decision(admit=waiting[:1] if first else waiting, ask_again=0.02 if first else math.inf)


def test_a_time_of_before_says_nothing_of_a_decision_that_is_not_carried_out() -> None:
    policy = StartsOneAfterTheOther()
    sim = Sim(LIMITS._replace(num_blocks=200, max_model_len=300, max_num_batched_tokens=16), policy)
    sim.add(prompt=[7] * 100, max_tokens=100)
    second = sim.add(prompt=[5, 6, 7], max_tokens=2)
    for _ in range(20):
        sim.settle()
    assert second.status is Status.ENDED


class Decides(SchedulerPolicy):
    """Decides one thing, and wants never to be asked again."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision._replace(ask_again=math.inf)
        self.refused: list[tuple[str, str]] = []
        self.asked = 0

    def schedule(self, view: SchedulerView) -> Decision:
        self.asked += 1
        self.refused += view.refused
        return self.decision


@pytest.mark.parametrize(
    ("decision", "refused"),
    [
        (Decision(admit=["ghost"]), ("ghost", "admit_unknown_request")),
        (Decision(admit=["r2"]), ("r2", "admit_adapter_not_ready")),
        (Decision(place=[Place("a", 7)]), ("a", "place_slot_unknown")),
        (Decision(preempt=["r1"]), ("r1", "preempt_not_running")),
        (Decision(evict=["ghost"]), ("ghost", "evict_unknown_adapter")),
    ],
)
def test_it_sees_what_was_refused_and_is_asked_again(decision: Decision, refused: tuple[str, str]) -> None:
    policy = Decides(decision)
    sim = Sim(LIMITS, policy)
    entry = sim.register("a")
    sim.add()
    sim.add("a")
    sim.core.residency.names.of(entry.label).load(sim.now, entry)
    sim.settle()
    for _ in range(3):
        sim.settle()
    assert policy.asked > 2
    assert policy.refused[0] == refused


def test_it_is_asked_again_if_not_all_requests_fit() -> None:
    policy = Decides(Decision(admit=["r1", "r2"]))
    sim = Sim(LIMITS._replace(num_blocks=12), policy)
    for _ in range(2):
        sim.add(prompt=[7] * 40, max_tokens=4)
    for _ in range(3):
        sim.settle()
    assert policy.asked > 1


def test_a_preemption_of_the_core_is_an_event() -> None:
    """It happens while the decision is carried out, but is no part of it."""
    policy = Decides(Decision(admit=["r1", "r2", "r3"]))
    sim = Sim(LIMITS._replace(num_blocks=12), policy)
    for i in range(3):
        sim.add(prompt=[20 + i] * 12, max_tokens=30)
    while not sim.of(events.RequestPreempted):
        sim.settle()
    before = policy.asked
    sim.settle()
    assert policy.asked > before


def asked(limits: CoreLimits) -> tuple[Sim, Callable[[], int]]:
    """Return a simulation of ``fcfs``, and how often it has been asked."""
    before = AskedAlways.questions
    return Sim(limits, AskedAlways("fcfs", says=True)), lambda: AskedAlways.questions - before


def test_nothing_is_asked_after_an_admission_that_leaves_nothing_to_decide() -> None:
    sim, count = asked(LIMITS._replace(num_blocks=200))
    sim.add(max_tokens=50)
    for _ in range(5):
        sim.settle(step_seconds=0.1)
    assert count() == 1
    sim.add(max_tokens=50)
    for _ in range(5):
        sim.settle(step_seconds=0.1)
    assert count() == 2
