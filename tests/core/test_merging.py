"""Which steps use merged weights, when an adapter is merged, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from support.core_sim import LIMITS, CoreSim

from aioengine import events
from aioengine.core import CoreLimits
from aioengine.core.state import AdapterEntry
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import Location
from aioengine.step import StepBatch

MERGES = LIMITS._replace(merges=True)


class Merge(SchedulerPolicy):
    """fcfs, which names adapters to merge."""

    def __init__(self, names: Callable[[], Sequence[str]]) -> None:
        self.inner, self.names = FCFS(), names
        self.views: list[tuple[bool, str | None, str | None]] = []

    def schedule(self, view: SchedulerView) -> Decision:
        merging = view.merging
        self.views.append((merging.possible, merging.adapter, merging.under_way))
        return self.inner.schedule(view)._replace(merge=self.names())


def sim_of(*names: str, limits: CoreLimits = MERGES) -> tuple[CoreSim, list[str]]:
    """A core whose policy names ``wanted``, and adapters."""
    wanted: list[str] = []
    sim = CoreSim(limits, Merge(lambda: wanted))
    for name in names:
        sim.register(name)
    return sim, wanted


def merged(sim: CoreSim, wanted: list[str], name: str) -> AdapterEntry:
    """Have an adapter read, placed, run and merged; its request goes on."""
    sim.add(name, max_tokens=40)
    sim.settle()
    sim.settle()
    wanted[:] = [name]
    sim.settle()
    sim.finish_merge()
    return sim.core.residency.current[name]


def next_batch(sim: CoreSim) -> StepBatch:
    """Take steps until one computes something."""
    for _ in range(10):
        batch = sim.settle()
        if batch is not None:
            return batch
    raise AssertionError("nothing is computed")


def refused(sim: CoreSim) -> set[tuple[str, str]]:
    return {(e.reason, e.item) for e in sim.events if isinstance(e, events.PolicyRefused)}


def test_only_steps_in_which_it_is_alone_use_the_merged_weights() -> None:
    sim, wanted = sim_of("a", "b")
    entry = merged(sim, wanted, "a")
    batch = sim.settle()
    assert batch is not None and batch.merged == entry.uid
    assert batch.contents().merged and batch.contents().adapters == 1
    for other in ("b", None):
        request = sim.add(other, max_tokens=3)
        mixed = 0
        while request.id not in sim.ended:
            batch = sim.settle()
            assert batch is not None
            alone = {work.slot for work in batch.sequences} == {entry.slot}
            assert (batch.merged is None) == (not alone)
            mixed += not alone
        assert mixed >= 3, "it runs beside the merged adapter, without a switch"
    batch = sim.settle()
    assert batch is not None and batch.merged == entry.uid, "alone again"


def test_a_request_for_another_adapter_runs_in_the_next_step() -> None:
    sim, wanted = sim_of("a")
    merged(sim, wanted, "a")
    sim.settle()
    request = sim.add(None)
    batch = sim.settle()
    assert batch is not None and request.id in {work.request_id for work in batch.sequences}


def test_another_adapter_takes_the_place_of_the_merged_one() -> None:
    sim, wanted = sim_of("a", "b")
    first = merged(sim, wanted, "a")
    sim.core.end(next(iter(sim.core.requests.values())), "abort", sim.now)
    sim.add("b", max_tokens=30)
    sim.settle()
    wanted[:] = ["b"]
    batch = sim.settle()
    assert batch is None or batch.merged is None
    assert sim.core.merging.entry is None, "its weights are being overwritten"
    assert [e.adapter for e in sim.of(events.AdapterUnmerged)] == ["a"]  # type: ignore[attr-defined]
    wanted[:] = ["a"]
    sim.settle()
    assert ("merge_busy", "a") in refused(sim)
    sim.finish_merge()
    wanted.clear()
    batch = sim.settle()
    assert batch is not None and batch.merged is not None and batch.merged != first.uid


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    sim, wanted = sim_of("a", "cold", "odd")
    sim.unmergeable = {"odd"}
    sim.add("odd", max_tokens=30)
    sim.settle()
    wanted[:] = ["cold", "odd", "ghost"]
    sim.settle()
    sim.settle()
    assert {("merge_not_on_cpu", "cold"), ("merge_not_exact", "odd"), ("merge_unknown_adapter", "ghost")} <= (
        refused(sim)
    )
    assert not sim.merges


def test_the_view_says_what_is_merged() -> None:
    sim, wanted = sim_of("a")
    policy = sim.core.guard.policy
    assert isinstance(policy, Merge)
    merged(sim, wanted, "a")
    assert policy.views[-1] == (True, None, None), "nothing was merged when it decided so"
    sim.settle()
    assert policy.views[-1] == (True, "a", None)
    sim.core.residency.retire(sim.core.residency.current["a"], sim.now)
    sim.settle()
    assert policy.views[-1] == (True, "a@1", None), "its requests still run"


def test_a_version_that_is_replaced_keeps_its_merged_weights_until_its_last_request_ends() -> None:
    sim, wanted = sim_of("a")
    old = merged(sim, wanted, "a")
    wanted.clear()
    sim.register("a")
    batch = sim.settle()
    assert batch is not None and batch.merged == old.uid
    sim.core.end(next(iter(sim.core.requests.values())), "abort", sim.now)
    sim.add("a", max_tokens=5)
    while sim.core.requests:
        batch = sim.settle()
        assert batch is None or batch.merged is None, "another version's weights"
    assert sim.core.merging.entry is None


def test_a_version_that_is_gone_before_it_is_merged_is_not_used() -> None:
    sim, wanted = sim_of("a")
    sim.add("a", max_tokens=30)
    sim.settle()
    wanted[:] = ["a"]
    sim.settle()
    wanted.clear()
    sim.core.residency.retire(sim.core.residency.current["a"], sim.now)
    sim.core.end(next(iter(sim.core.requests.values())), "abort", sim.now)
    sim.settle()
    sim.finish_merge()
    sim.core.check()
    assert sim.core.merging.entry is None and not sim.of(events.AdapterMerged)


def test_files_that_changed_in_place_are_not_what_was_merged() -> None:
    sim, wanted = sim_of("a", "b", limits=MERGES._replace(cpu_capacity=1, num_slots=1))
    old = merged(sim, wanted, "a")
    wanted.clear()
    for changed in (False, True):
        sim.core.end(next(iter(sim.core.requests.values())), "abort", sim.now)
        sim.add("b", max_tokens=1)
        sim.run()
        assert old.location is Location.DISK and sim.core.merging.entry is old
        sim.contents["a"] = int(changed)
        sim.add("a", max_tokens=30)
        assert (next_batch(sim).merged == old.uid) is not changed
    assert sim.core.merging.entry is None
    assert [e.adapter for e in sim.of(events.AdapterUnmerged)] == ["a"]  # type: ignore[attr-defined]
    wanted[:] = ["a"]
    sim.settle()
    sim.finish_merge()
    assert next_batch(sim).merged == old.uid, "the new files are merged"


def test_files_that_changed_while_they_were_merged_are_not_what_was_merged() -> None:
    sim, wanted = sim_of("a", "b", limits=MERGES._replace(cpu_capacity=1, num_slots=1))
    sim.add("a", max_tokens=2)
    next_batch(sim)
    wanted[:] = ["a"]
    sim.run()
    wanted.clear()
    sim.add("b", max_tokens=1)
    sim.run()
    sim.contents["a"] = 1
    sim.add("a", max_tokens=30)
    sim.settle()
    next_batch(sim)
    sim.finish_merge()
    assert next_batch(sim).merged is None
    assert sim.core.merging.entry is None and not sim.of(events.AdapterMerged)


def test_a_content_that_failed_to_merge_is_not_tried_again_but_another_is() -> None:
    sim, wanted = sim_of("a", "b", limits=MERGES._replace(cpu_capacity=1, num_slots=1))
    sim.add("a", max_tokens=2)
    next_batch(sim)
    entry = sim.core.residency.current["a"]
    wanted[:] = ["a"]
    sim.run()
    sim.finish_merge(fail=True)
    wanted.clear()
    for content in (0, 1, 0):
        sim.add("b", max_tokens=1)
        sim.run()
        assert entry.location is Location.DISK
        sim.contents["a"] = content
        sim.add("a", max_tokens=1)
        sim.run()
        assert entry.mergeable is bool(content)


def test_a_failed_merge_is_not_tried_again_and_harms_nobody() -> None:
    sim, wanted = sim_of("a")
    request = sim.add("a", max_tokens=10)
    sim.settle()
    wanted[:] = ["a"]
    sim.settle()
    sim.finish_merge(fail=True)
    sim.run()
    assert sim.ended == {request.id: "length"}
    assert ("merge_not_exact", "a") in refused(sim) and not sim.merges


def test_a_lost_device_has_lost_the_merged_weights() -> None:
    sim, wanted = sim_of("a")
    merged(sim, wanted, "a")
    wanted.clear()
    sim.lose_device()
    assert sim.core.merging.entry is None
    sim.add("a", max_tokens=3)
    while sim.core.requests:
        batch = sim.settle()
        assert batch is None or batch.merged is None


@pytest.mark.parametrize("merges", [False, True])
def test_measured_costs_of_a_merge_and_of_merged_steps(merges: bool) -> None:
    sim, wanted = sim_of("a", limits=LIMITS._replace(merges=merges))
    costs = sim.core._view.costs
    assert costs.merge("a") is None and costs.step(1) is None
    sim.add("a", max_tokens=60)
    for _ in range(3):
        sim.settle()
    wanted[:] = ["a"]
    sim.settle()
    if not merges:
        assert ("merge_not_supported", "a") in refused(sim)
        return
    sim.finish_merge(seconds=2.5)
    assert costs.merge("a") == 2.5
    sim.register("b")
    assert costs.merge("b") == 2.5, "as that of others, before its own is known"
    for _ in range(40):
        sim.schedule()
        sim.finish_step(seconds=0.02)
        if not sim.core.requests:
            break
    with_it, without = costs.step(1, [8]), costs.step(1)
    assert with_it is not None and without is not None and without == pytest.approx(0.02, rel=0.3)
