"""What version 2 of the policy interface adds: cached tokens, rejections, and what things take."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aioengine import events
from aioengine.errors import RequestRejected
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim

Extra = Callable[[SchedulerView], Decision]


class With(SchedulerPolicy):
    """fcfs, with what ``extra`` decides beside it."""

    def __init__(self, extra: Extra) -> None:
        self.inner = FCFS()
        self.extra = extra

    def schedule(self, view: SchedulerView) -> Decision:
        extra = self.extra(view)
        return self.inner.schedule(view)._replace(reject=extra.reject, discard=extra.discard)


def refusals(sim: Sim) -> list[tuple[str, str]]:
    return [(e.reason, e.item) for e in sim.events if isinstance(e, events.PolicyRefused)]


def test_a_waiting_request_that_is_rejected_ends_with_the_reason() -> None:
    sim = Sim(policy=With(lambda view: Decision(reject=[("r1", "too late"), ("ghost", "")])))
    sim.add()
    sim.add()
    sim.run()
    assert sim.ended == {"r1": "error", "r2": "length"}
    [end] = [e for e in sim.events if isinstance(e, events.RequestEnded) and e.request_id == "r1"]
    assert isinstance(end.error, RequestRejected)
    assert end.error.reason == "too late"
    assert "'r1'" in str(end.error) and "too late" in str(end.error)
    assert ("reject_unknown_request", "ghost") in refusals(sim)


def test_nobody_who_ran_is_rejected_not_even_after_a_preemption() -> None:
    asked: list[tuple[str, str]] = []
    sim = Sim(policy=With(lambda view: Decision(reject=asked)))
    request = sim.add(max_tokens=6)
    sim.settle()
    asked.append(("r1", "while it runs"))
    sim.settle()
    sim.core.batcher.preempt(request, sim.now)
    sim.run()
    assert sim.ended == {"r1": "length"}
    assert set(refusals(sim)) == {("reject_already_started", "r1")}


def test_only_what_nothing_uses_is_discarded() -> None:
    sim = Sim(policy=With(lambda view: Decision(discard=["a", "pinned", "ghost"])))
    for name in ("a", "pinned"):
        sim.register(name)
    sim.core.residency.names.of("pinned").pin(sim.now)
    sim.core.residency.names.of("pinned").load(sim.now)
    request = sim.add("a", max_tokens=3)
    sim.run()
    assert sim.ended == {request.id: "length"}
    told = set(refusals(sim))
    assert ("discard_unknown_adapter", "ghost") in told
    assert {("discard_busy", "a"), ("discard_pinned", "pinned")} <= told
    sim.settle()
    held = [slot.entry.name for slot in sim.core.slots.slots if slot.entry is not None]
    assert held == ["pinned"]


def test_cached_tokens_are_those_that_admission_finds() -> None:
    seen: dict[str, int] = {}

    def look(view: SchedulerView) -> Decision:
        seen.update((request.request_id, request.cached_tokens) for request in view.waiting)
        return Decision()

    sim = Sim(LIMITS._replace(num_blocks=100), With(look))
    prompt = [5, 6, 7, 8] * 3
    for adapter in ("a", "b"):
        sim.register(adapter)
    for adapter, own, cached in (
        (None, prompt, 0),
        (None, prompt, 8),  # the last token is always left to compute
        (None, [*prompt, 9], 12),
        (None, [*prompt[:6], 1, 1, 1], 4),
        ("a", prompt, 0),  # another's are not found
        ("a", prompt, 8),
    ):
        request = sim.add(adapter, prompt=own, max_tokens=1)
        view = request.view
        sim.run()
        assert (seen[request.id], request.cached_tokens, view.cached_tokens) == (cached,) * 3


def test_an_adapter_that_comes_back_with_other_contents_shares_nothing_with_before() -> None:
    """Its folder was changed in place, while a request for it waited and somebody had looked at that."""
    sim = Sim(LIMITS._replace(num_blocks=100), With(lambda view: Decision()))
    entry = sim.register("a")
    prompt = [5, 6, 7, 8, 9]
    sim.add("a", prompt=prompt, max_tokens=1)
    sim.run()
    request = sim.add("a", prompt=prompt, max_tokens=1)
    assert request.view.cached_tokens == 4
    entry.digest = "other"
    assert request.view.cached_tokens == 0
    sim.run()
    assert request.cached_tokens == 0


def test_costs_are_measured_from_when_they_are_asked_for() -> None:
    found: list[float | None] = []

    def ask(view: SchedulerView) -> Decision:
        found.append(view.costs.step(1))
        return Decision()

    sim = Sim(policy=With(ask))
    sim.add(max_tokens=30)
    while sim.core.requests:
        batch = sim.schedule()
        assert batch is not None
        sim.finish_step(seconds=0.02)
    assert found[0] is None
    assert found[-1] == pytest.approx(0.02, rel=0.05)
