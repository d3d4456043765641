"""Priorities, and preemption for their sake."""

from __future__ import annotations

import pytest
from support.policy_cases import preempted

from aioengine.core import CoreLimits
from aioengine.core.state import Request
from aioengine.schedulers import compose
from aioengine.schedulers.parts.base import Preemption
from aioengine.schedulers.policies.by_key import PreemptLower, Priority
from aioengine.testing import LIMITS, Sim


def priority_sim(limits: CoreLimits, preempt: Preemption | None = None) -> Sim:
    return Sim(limits, compose(order=Priority(), preempt=preempt))


def running(sim: Sim, priorities: list[int], tokens: int = 20) -> list[Request]:
    """Requests that arrive one after the other, and run."""
    requests = []
    for priority in priorities:
        requests.append(sim.add(max_tokens=tokens, priority=priority))
        sim.settle()
    assert all(r.admitted is not None for r in requests)
    return requests


def test_the_lowest_and_youngest_makes_way_and_ends_all_the_same() -> None:
    sim = priority_sim(LIMITS._replace(max_num_seqs=3), PreemptLower())
    requests = running(sim, [1, 0, 0])
    urgent = sim.add(max_tokens=2, priority=7)
    start = sim.now
    sim.run()
    assert preempted(sim) == [requests[2].id]
    assert urgent.admitted is not None
    assert urgent.admitted - start < 0.015, "the step after the one in which the other made way"
    assert set(sim.ended.values()) == {"length"}
    assert all(r.output_tokens == 20 for r in requests)


@pytest.mark.parametrize(("places", "priorities"), [(2, (3, -2)), (4, (9,))])
def test_nobody_makes_way_for_who_is_not_above_him_or_has_room(places: int, priorities: tuple[int]) -> None:
    sim = priority_sim(LIMITS._replace(max_num_seqs=places), PreemptLower())
    running(sim, [3, 3])
    for priority in priorities:
        sim.add(priority=priority)
    sim.run()
    assert preempted(sim) == []


def test_lack_of_blocks_is_a_reason_too_and_enough_make_way() -> None:
    sim = priority_sim(LIMITS._replace(num_blocks=8, max_num_batched_tokens=64), PreemptLower())
    low = [sim.add(prompt=[40 + i] * 11, max_tokens=4) for i in range(2)]  # 3 blocks each
    sim.settle()
    assert all(r.admitted is not None for r in low)
    high = sim.add(prompt=[9] * 27, max_tokens=2, priority=1)  # 7 blocks
    sim.settle()
    sim.settle()
    assert high.admitted is not None
    assert set(preempted(sim)) == {r.id for r in low}
    sim.run()
    assert set(sim.ended.values()) == {"length"}


def test_nobody_loses_his_work_where_that_would_not_be_enough() -> None:
    sim = priority_sim(LIMITS._replace(num_blocks=8, max_num_batched_tokens=64), PreemptLower())
    keeper = sim.add(prompt=[40] * 11, max_tokens=4, priority=5)
    low = sim.add(prompt=[50] * 7, max_tokens=4)
    sim.settle()
    assert keeper.admitted is not None and low.admitted is not None
    sim.add(prompt=[9] * 27, max_tokens=2, priority=1)  # all blocks but one, and the keeper has three
    sim.run()
    assert preempted(sim) == []


def test_a_request_that_is_not_admitted_after_all_has_others_make_way_only_once() -> None:
    """Its adapter's slot is closed, because another adapter has waited for it for too long."""
    sim = Sim(
        LIMITS._replace(max_num_seqs=2, num_slots=1),
        compose(order=Priority(), preempt=PreemptLower(), max_wait=0.05),
    )
    for name in "ab":
        sim.register(name)
    sim.add("a", max_tokens=40, priority=3)
    for _ in range(3):
        sim.settle()
    aged = sim.add("b", max_tokens=4)
    for _ in range(10):
        sim.settle()
    for _ in range(3):
        sim.add(max_tokens=40)
    sim.settle()
    high = sim.add("a", priority=2)
    sim.run()
    assert aged.admitted is not None and high.admitted is not None
    assert aged.admitted < high.admitted, "the case is none: the slot was not closed"
    assert len(preempted(sim)) == 1
