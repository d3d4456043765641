"""Lanes by request size, and the cache that weighs frequency, recency and size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aioengine.core.state import Request
from aioengine.schedulers import Composed, compose
from aioengine.schedulers.policies.chameleon import ChameleonCache, ChameleonOrder
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import PolicyEvent, SchedulerPolicy
from aioengine.testing import LIMITS, Sim

STEP = 0.05
SMALL, LARGE = 4, 40  # tokens to generate
ROOMY = LIMITS._replace(num_blocks=400, max_num_seqs=4, max_num_batched_tokens=64)


def chameleon(**options: Any) -> Composed:
    """The whole of Chameleon: the lanes and the cache."""
    return compose(order=ChameleonOrder(**options))


def warm(policy: SchedulerPolicy, **limits: int) -> Sim:
    """Enough small and large requests have passed for the lanes to be formed."""
    sim = Sim(ROOMY._replace(**limits), policy)
    sim.register("a")
    for _ in range(4):
        for _ in range(3):
            sim.add("a", max_tokens=SMALL)
        sim.add("a", max_tokens=LARGE)
    sim.run(step_seconds=STEP)
    return sim


def waited(request: Request) -> float:
    assert request.admitted is not None, "starved"
    return request.admitted - request.arrival


def small_behind_large(policy: SchedulerPolicy) -> float:
    sim = warm(policy)
    for _ in range(12):
        sim.add("a", max_tokens=LARGE)
    sim.settle(step_seconds=STEP)
    small = sim.add("a", max_tokens=SMALL)
    sim.run(step_seconds=STEP)
    return waited(small)


def large_behind_small(policy: SchedulerPolicy) -> float:
    sim = warm(policy)
    for _ in range(4):  # so that one place after the other becomes free, not all four at once
        sim.add("a", max_tokens=SMALL)
        sim.settle(step_seconds=STEP)
    for _ in range(60):
        sim.add("a", max_tokens=SMALL)
    sim.settle(step_seconds=STEP)
    large = sim.add("a", max_tokens=LARGE)
    for _ in range(400):
        sim.add("a", max_tokens=SMALL)
        sim.add("a", max_tokens=SMALL)
        sim.settle(step_seconds=STEP)
        if large.admitted is not None:
            break
    return waited(large)


def test_a_small_request_is_not_stuck_behind_large_ones() -> None:
    generation = (LARGE + 1) * STEP
    assert small_behind_large(chameleon(age=60.0)) <= generation, "it has the next free place"
    assert small_behind_large(FCFS()) > 2 * generation, "12 large ones, 4 at a time, are before it"


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    # Its lane has a place, which it gets as soon as a small one that borrowed it has ended.
    assert large_behind_small(chameleon(age=60.0)) <= (SMALL + 2) * STEP
    assert large_behind_small(FCFS()) > 10 * SMALL * STEP, "60 small ones, 4 at a time, are before it"


def test_size_is_the_papers_product() -> None:
    order = ChameleonOrder(refresh=3)
    sizes = {"big": SimpleNamespace(bytes=800), "little": SimpleNamespace(bytes=200)}
    view: Any = SimpleNamespace(now=0.0, adapters=sizes, running=[], free_seqs=8, waiting_for=lambda name: ())
    for tokens_in, tokens_out, name in ((100, 10, "big"), (50, 40, "little"), (10, 10, None)):
        request: Any = SimpleNamespace(
            request_id="x", prompt_tokens=tokens_in, expected_tokens=tokens_out, adapter=name, arrival=0.0
        )
        order.on_event(PolicyEvent("request_added", 0.0, request))
    order.admit(view, [None], 8)
    assert order.size(view, 50, 20, "big") == pytest.approx((0.4 * 50 / 100 + 0.6 * 20 / 40) * 1)
    assert order.size(view, 50, 20, "little") == pytest.approx((0.4 * 50 / 100 + 0.6 * 20 / 40) * 200 / 800)
    assert order.size(view, 50, 20, None) == order.size(view, 50, 20, "little"), "as the smallest adapter"


def test_the_cache_scores_frequency_recency_and_size() -> None:
    cache = ChameleonCache(half_life=0)
    for name in "aaaabbc":
        cache.on_event(PolicyEvent("request_admitted", 0.0, None, name))
    adapters = {name: SimpleNamespace(name=name, bytes=size) for name, size in (("a", 1), ("b", 4), ("c", 8))}
    slots = [SimpleNamespace(adapter=n, last_used=t) for n, t in (("a", 10.0), ("b", 15.0), ("c", 20.0))]
    view: Any = SimpleNamespace(now=20.0, slots=[*slots, SimpleNamespace(adapter=None)], adapters=adapters)
    scores = {s.adapter: cache.score(view, s, adapters[s.adapter]) for s in slots}  # type: ignore[arg-type]
    assert scores["a"] == pytest.approx(0.45 * 1.0 + 0.10 * 0.0 + 0.45 / 8)
    assert scores["b"] == pytest.approx(0.45 * 0.5 + 0.10 * 0.5 + 0.45 * 0.5)
    assert scores["c"] == pytest.approx(0.45 * 0.25 + 0.10 * 1.0 + 0.45 * 1.0)
