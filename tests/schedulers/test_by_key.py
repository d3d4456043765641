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
