"""Queues that are kept sorted, against sorting everything, under random events; and the cost of decisions."""

from __future__ import annotations

import sys
from itertools import chain
from statistics import median
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.schedulers import SchedulerPolicy, available_policies, load_policy
from aioengine.schedulers.parts.lazy_merge import lazy_merge
from aioengine.schedulers.parts.waiting_index import WaitingIndex
from aioengine.schedulers.policy import Decision, PolicyEvent, SchedulerView
from aioengine.testing import LIMITS, Sim

NAMES = ("a", "b", "c", None)


@given(st.lists(st.lists(st.integers(0, 20), min_size=1).map(sorted), max_size=6))
def test_a_lazy_merge_is_a_merge(queues: list[list[int]]) -> None:
    queues.sort(key=lambda queue: queue[0])
    assert list(lazy_merge(queues, lambda number: number)) == sorted(chain.from_iterable(queues))


def test_a_queue_is_opened_when_its_first_is_the_next() -> None:
    opened: list[int] = []

    def queues() -> Any:
        for first in (1, 5, 9):
            opened.append(first)
            yield [first, first + 1]

    merged = lazy_merge(queues(), lambda number: number)
    assert [next(merged), next(merged)] == [1, 2]
    assert opened == [1, 5], "the one that begins with 9 cannot be the next yet"


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "admit", "preempt", "finish", "rename", "missed"]),
        st.sampled_from(NAMES),
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(EVENTS, st.sets(st.sampled_from((*NAMES, "a@1"))))
def test_an_index_is_what_sorting_everything_gives(happens: list[Any], names: set[str | None]) -> None:
    index = WaitingIndex(lambda request: request.priority)
    waiting: dict[str, Any] = {}
    running: dict[str, Any] = {}

    def tell(kind: str, request: Any) -> None:
        index.on_event(PolicyEvent(kind, 0.0, request, request.adapter))

    for number, (what, name, priority, which) in enumerate(happens):
        if what in ("add", "missed"):
            request = SimpleNamespace(
                request_id=f"r{number}", adapter=name, priority=priority, arrival=number // 3
            )
            waiting[request.request_id] = request
            if what == "add":
                tell("request_added", request)
        elif what == "preempt" and running:
            request = running.pop(list(running)[which % len(running)])
            waiting[request.request_id] = request
            tell("request_preempted", request)
        elif what in ("admit", "finish") and waiting:
            request = waiting.pop(list(waiting)[which % len(waiting)])
            if what == "admit":
                running[request.request_id] = request
            tell(f"request_{what}ted" if what == "admit" else "request_finished", request)
        elif what == "rename":
            for request in [*waiting.values(), *running.values()]:
                if request.adapter == "a":
                    request.adapter = "a@1"
            index.on_event(PolicyEvent("adapter_retired", 0.0, None, "a@1", was="a"))
    view: Any = SimpleNamespace(waiting=list(waiting.values()))
    index.sync(view)
    able = [r for r in waiting.values() if r.adapter in names]
    keys = [(r.priority, r.arrival) for r in index.in_order(names)]
    assert keys == sorted((r.priority, r.arrival) for r in able)
    assert {r.request_id for r in index.in_order(names)} == {r.request_id for r in able}
    heads = [((entry.key, entry.arrival), name) for entry, name in index.heads()]
    firsts = {
        name: min((r.priority, r.arrival) for r in waiting.values() if r.adapter == name)
        for name in {r.adapter for r in waiting.values()}
    }
    assert [key for key, _ in heads] == sorted(firsts.values())
    assert {name: key for key, name in heads} == firsts


class Counted(SchedulerPolicy):
    """Counts the Python calls of another policy's decisions."""

    def __init__(self, inner: SchedulerPolicy) -> None:
        self.inner = inner
        self.on_event = inner.on_event  # type: ignore[method-assign]
        self.calls: list[int] = []

    def schedule(self, view: SchedulerView) -> Decision:
        count = 0

        def called(frame: FrameType, what: str, arg: object) -> None:
            nonlocal count
            count += what == "call"

        before = sys.getprofile()
        sys.setprofile(called)
        try:
            return self.inner.schedule(view)
        finally:
            sys.setprofile(before)
            self.calls.append(count)


def calls(name: str, waiting: int) -> float:
    """Median of the calls of a decision while so many requests wait, for 40 adapters and with 8 slots."""
    policy = Counted(load_policy(name))
    limits = LIMITS._replace(
        num_slots=8, cpu_capacity=16, num_blocks=400, max_num_seqs=16, max_num_batched_tokens=64
    )
    sim = Sim(limits, policy)
    for index in range(40):
        sim.register(f"adapter-{index}")
    for index in range(waiting):
        sim.add(f"adapter-{index * index % 40}", max_tokens=3 + index % 5, tenant=f"t{index % 3}")
    sim.settle()
    for _ in range(90):
        sim.settle(step_seconds=0.05, check=False)
    sim.core.check()
    assert len(sim.core.queues) > waiting // 3, "or there would be nothing to look at"
    return median(policy.calls[-40:])


@pytest.mark.parametrize("name", sorted(set(available_policies()) - {"oracle", "belady"}))
@pytest.mark.slow
def test_a_decision_costs_no_more_with_a_longer_queue(name: str) -> None:
    few, many = calls(name, 600), calls(name, 2400)
    # A bounded number of requests may change lanes in chameleon. To look at 1,800 more would be 5,000 calls.
    assert many <= 1.3 * few + 900, (few, many)
