"""Earliest deadline first."""

from __future__ import annotations

from aioengine import events
from aioengine.core import CoreLimits
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.parts.preemption import NoPreemption
from aioengine.schedulers.parts.prefetch import Lookahead
from aioengine.schedulers.parts.replacement import LRU
from aioengine.schedulers.policies.by_key import EDF
from aioengine.testing import LIMITS, Sim


def edf_sim(limits: CoreLimits) -> Sim:
    return Sim(limits, Composed(EDF(), LRU(), Lookahead(), NoPreemption(), max_wait=1e9))


def order_of(sim: Sim) -> list[str]:
    return [e.request_id for e in sim.of(events.RequestAdmitted)]  # type: ignore[attr-defined]


def test_deadlines_first_then_arrival() -> None:
    sim = edf_sim(LIMITS._replace(max_num_seqs=1))
    requests = [sim.add(deadline=due) for due in (None, 90.0, None, 30.0, 60.0)]
    sim.run()
    assert order_of(sim) == [requests[i].id for i in (3, 4, 1, 0, 2)]


def test_the_adapter_of_the_most_urgent_request_gets_the_slot_first() -> None:
    sim = edf_sim(LIMITS._replace(num_slots=1, cpu_capacity=4))
    for name in "abc":
        sim.register(name)
    relaxed, never, urgent = sim.add("a", deadline=80.0), sim.add("b"), sim.add("c", deadline=20.0)
    sim.run()
    assert order_of(sim) == [urgent.id, relaxed.id, never.id]


def test_an_idle_slot_is_given_to_an_urgent_cold_request_at_once() -> None:
    sim = edf_sim(LIMITS._replace(num_slots=1, cpu_capacity=2))
    for name in "ba":  # both on the CPU, a in the slot
        sim.register(name)
        sim.add(name)
        sim.run()
    urgent = sim.add("b", deadline=sim.now + 1.0)
    start = sim.now
    sim.run(step_seconds=0.01)
    assert urgent.admitted is not None
    assert urgent.admitted - start <= 2 * 0.01, "one step to copy it"


def test_a_deadline_that_has_passed_ends_the_request_and_nobody_else() -> None:
    sim = edf_sim(LIMITS._replace(max_num_seqs=1))
    running = sim.add(max_tokens=20)
    sim.settle(step_seconds=0.1)
    late, patient = sim.add(deadline=sim.now + 0.5), sim.add()
    sim.run(step_seconds=0.1)
    assert sim.ended[late.id] == "error"
    assert sim.ended[running.id] == sim.ended[patient.id] == "length"
