"""Orderings by a fixed key: shortest job first, earliest deadline first."""

from __future__ import annotations

from support.policy_cases import order_of

from aioengine.core import CoreLimits
from aioengine.core.state import Request
from aioengine.schedulers import compose
from aioengine.schedulers.policies.by_key import EDF, SJF
from aioengine.testing import LIMITS, Sim


def serial_sim(order: SJF) -> Sim:
    """One at a time."""
    return Sim(LIMITS._replace(max_num_seqs=1), compose(order=order))


def add_sized(sim: Sim, prompt: int, tokens: int) -> Request:
    return sim.add(prompt=[3] * prompt, max_tokens=tokens)


def test_the_shortest_goes_first_and_equals_by_arrival() -> None:
    sim = serial_sim(SJF())
    sizes = [(9, 9), (2, 6), (3, 2), (6, 2), (1, 1)]
    requests = [add_sized(sim, *size) for size in sizes]
    sim.run()
    assert order_of(sim) == [requests[i].id for i in (4, 2, 1, 3, 0)]


def test_what_is_expected_goes_before_what_is_allowed() -> None:
    sim = serial_sim(SJF())
    long = sim.add(max_tokens=4)
    short = sim.add(max_tokens=9, expected_tokens=2)
    sim.run()
    assert order_of(sim) == [short.id, long.id]


def test_a_new_version_of_an_adapter_does_not_mix_up_the_queues() -> None:
    sim = Sim(LIMITS._replace(max_num_seqs=1), compose(order=SJF()))
    sim.register("a")
    old = [sim.add("a", max_tokens=t) for t in (5, 2, 4)]
    sim.register("a")
    new = [sim.add("a", max_tokens=t) for t in (3, 6, 1)]
    sim.run()
    assert set(sim.ended.values()) == {"length"}
    order = order_of(sim)
    for batch, expected in ((old, (1, 2, 0)), (new, (2, 0, 1))):
        assert [i for i in order if i in {r.id for r in batch}] == [batch[k].id for k in expected]


def edf_sim(limits: CoreLimits) -> Sim:
    return Sim(limits, compose(order=EDF(), max_wait=1e9))


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
