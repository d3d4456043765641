from __future__ import annotations

import itertools

import pytest

from aioengine import events
from aioengine.errors import DeadlineExceeded
from aioengine.schedulers import Decision, Place, SchedulerPolicy, SchedulerView
from aioengine.testing import LIMITS, Sim


class Scripted(SchedulerPolicy):
    """Returns the next of the given decisions, then nothing."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def schedule(self, view: SchedulerView) -> Decision:
        return self.answers.pop(0) if self.answers else Decision()  # type: ignore[return-value]


def refusals(sim: Sim) -> list[str]:
    return [event.reason for event in sim.of(events.PolicyRefused)]  # type: ignore[attr-defined]


def test_deadlines_end_waiting_and_running_requests() -> None:
    sim = Sim()
    sim.register("a")
    waiting = sim.add("a", deadline=1.0)
    running = sim.add(max_tokens=40, deadline=1.5)
    assert sim.core.next_due() == 1.0
    sim.schedule()
    sim.now = 1.2
    sim.finish_step()
    sim.schedule()
    assert sim.ended == {waiting.id: "error"}
    sim.finish_step()
    sim.now = 2.0
    sim.schedule()
    assert sim.ended == {waiting.id: "error", running.id: "error"}
    errors = [e.error for e in sim.of(events.RequestEnded)]  # type: ignore[attr-defined]
    assert all(isinstance(error, DeadlineExceeded) for error in errors)
    assert sim.core.next_due() is None
    assert "for adapter 'a' (location: loading)" in str(errors[0])
    assert "adapter" not in str(errors[1])


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "admit everything",
        Decision(admit="r1"),
        Decision(admit=[1]),  # type: ignore[list-item]
        Decision(place=[Place("a", "0")]),  # type: ignore[arg-type]
        Decision(prefetch=None),  # type: ignore[arg-type]
        Decision(admit=itertools.repeat("r1")),  # type: ignore[arg-type]
        Decision(admit=["r1"] * 100_000),
        Decision(reject=["r1"]),  # type: ignore[list-item]
        Decision(reject=[("r1", 3)]),  # type: ignore[list-item]
        Decision(reject=[("r1", "a", "b")]),  # type: ignore[list-item]
    ],
)
def test_a_malformed_decision_falls_back_to_the_safe_policy(answer: object) -> None:
    sim = Sim(policy=Scripted(answer), strict=False)
    sim.add()
    assert sim.schedule() is not None
    assert len(sim.of(events.PolicyFailed)) == 1


def test_each_bad_item_is_refused_alone() -> None:
    decision = Decision(
        admit=["ghost", "r1", "r1", "r2"],
        place=[Place("ghost"), Place("a", 7)],
        prefetch=["ghost"],
        preempt=["r1", "ghost"],
    )
    sim = Sim(policy=Scripted(Decision(prefetch=["a"]), decision))
    sim.register("a")
    sim.add()
    sim.add("a")
    assert sim.schedule() is None
    sim.finish_load()
    batch = sim.schedule()
    assert batch is not None
    assert [work.request_id for work in batch.sequences] == ["r1"], "the good item is carried out"
    assert sorted(refusals(sim)) == [
        "admit_adapter_not_ready",
        "admit_not_waiting",
        "admit_unknown_request",
        "place_slot_unknown",
        "place_unknown_adapter",
        "preempt_not_running",
        "preempt_not_running",
        "prefetch_unknown_adapter",
    ]


def test_slots_that_must_not_be_taken_are_refused() -> None:
    sim = Sim(LIMITS._replace(num_slots=2, cpu_capacity=4))
    for name in "abc":
        sim.register(name)
    sim.add("a", max_tokens=30)
    for _ in range(3):
        sim.settle()
    for name in "bc":
        sim.core.residency.names.of(name).load(sim.now)
    sim.settle()
    while sim.loads:
        sim.finish_load()
    # Slot 0 runs a; slot 1 is being written with b.
    sim.core.guard.policy = Scripted(
        Decision(place=[Place("c", 0), Place("b", 1), Place("c", 1), Place("b"), Place("c")]),
    )
    sim.schedule()
    assert refusals(sim) == [
        "place_slot_busy",
        "place_slot_loading",
        "place_already_placed",
        "place_no_slot",
    ]
    sim.core.check()
