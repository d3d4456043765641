"""dlora: merges an adapter that has been alone for as long as a merge costs, and none else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from support.core_sim import LIMITS
from support.strict_sim import StrictSim

from aioengine import events
from aioengine.core import Core
from aioengine.schedulers import Decision, SchedulerView, load_policy
from aioengine.schedulers.policies.dlora import DLoRA

ROOM = LIMITS._replace(merges=True, num_blocks=400, max_model_len=400, max_num_seqs=4)


class Costs:
    """A step takes 10 ms, and 1 ms more with adapters; a merge takes 50 ms, or is not known."""

    merge_seconds: float | None = 0.05
    saved = 0.001

    def step(self, tokens: int, ranks: Sequence[int] = (), *, context: int = 0) -> float | None:
        return 0.01 + self.saved if ranks else 0.01

    def prefill(self, tokens: int, rank: int = 0, *, cached: int = 0) -> float | None:
        return 0.001 * tokens

    def load(self, adapter: str, stage: str) -> float | None:
        return 0.1

    def merge(self, adapter: str) -> float | None:
        return self.merge_seconds


def sim_of(policy: str = "dlora:alone=0", limits: Any = ROOM, costs: Costs | None = None) -> StrictSim:
    sim = StrictSim(limits, load_policy(policy))
    sim.core = Core(limits, load_policy(policy), costs=costs or Costs())
    for name in ("a", "b"):
        sim.register(name)
    return sim


def steps_until_merging(sim: StrictSim, most: int = 200) -> int | None:
    for step in range(most):
        if sim.merges:
            return step
        if not sim.core.requests:
            return None
        sim.settle()
    return None


def test_it_merges_once_it_would_have_saved_as_much_as_a_merge_takes() -> None:
    sim = sim_of()
    sim.add("a", max_tokens=300)
    found = steps_until_merging(sim)
    assert found is not None and 50 <= found <= 55, "50 steps of 1 ms saved each are 50 ms"
    sim.finish_merge()
    batch = sim.settle()
    assert batch is not None and batch.merged is not None
    for _ in range(100):
        sim.settle()
    assert not sim.merges and len(sim.of(events.AdapterMerged)) == 1, "it stays merged"


@pytest.mark.parametrize("payback", [0.5, 2.0])
def test_payback_is_in_merges(payback: float) -> None:
    sim = sim_of(f"dlora:alone=0,payback={payback}")
    sim.add("a", max_tokens=300)
    found = steps_until_merging(sim)
    assert found is not None and 50 * payback <= found <= 50 * payback + 5


def test_an_adapter_that_is_not_alone_is_not_merged() -> None:
    for other in ("b", None):
        sim = sim_of()
        sim.add("a", max_tokens=150)
        sim.add(other, max_tokens=150)
        assert steps_until_merging(sim) is None
        assert set(sim.ended.values()) == {"length"}


def test_savings_are_kept_while_others_run() -> None:
    sim = sim_of()
    sim.add("a", max_tokens=390)
    for _ in range(40):
        sim.settle()
    other = sim.add("b", max_tokens=60)
    while other.id not in sim.ended:
        sim.settle()
        assert not sim.merges
    found = steps_until_merging(sim)
    assert found is not None and found <= 20, "30 or more of the 50 ms were saved before"


def test_alone_is_in_one_piece() -> None:
    sim = sim_of("dlora:alone=0.5,payback=0")
    sim.add("a", max_tokens=390)
    for _ in range(40):
        sim.settle()
    other = sim.add(None, max_tokens=3)
    while other.id not in sim.ended:
        sim.settle()
    found = steps_until_merging(sim)
    assert found is not None and 50 <= found <= 55, "steps of 10 ms"


def test_without_a_measured_merge_the_time_alone_decides() -> None:
    costs = Costs()
    costs.merge_seconds = None
    sim = sim_of("dlora:alone=0.3", costs=costs)
    sim.add("a", max_tokens=300)
    found = steps_until_merging(sim)
    assert found is not None and 30 <= found <= 35


def test_two_adapters_in_turn_are_merged_only_as_often_as_it_pays() -> None:
    sim = sim_of()
    for turn in range(40):
        sim.add("ab"[turn % 2], max_tokens=20)
        while sim.core.requests:
            sim.settle()
            if sim.merges:
                sim.finish_merge()
    merges = len(sim.of(events.AdapterMerged))
    assert merges <= 800 * 0.001 / 0.05, "each has been paid for by what steps would have saved"
    assert merges >= 4


def test_it_asks_for_nothing_where_nothing_can_be_merged() -> None:
    sim = sim_of(limits=ROOM._replace(merges=False))
    sim.add("a", max_tokens=150)
    sim.run()
    assert not [e for e in sim.of(events.PolicyRefused) if "merge" in e.reason]  # type: ignore[attr-defined]
    sim = sim_of()
    sim.unmergeable = {"a"}
    sim.add("a", max_tokens=150)
    sim.run()
    assert not sim.of(events.PolicyRefused)


def test_replaced_and_unloaded_adapters_are_forgotten() -> None:
    sim = sim_of()
    sim.add("a", max_tokens=390)
    for _ in range(40):
        sim.settle()
    sim.register("a")
    found = steps_until_merging(sim)
    assert found is not None and 45 <= found <= 60, "a@1 begins anew"
    [entry] = sim.merges
    assert entry.version == 1


def test_what_becomes_of_other_adapters_does_not_matter() -> None:
    sim = sim_of("dlora:alone=0.5,payback=0")
    sim.add("a", max_tokens=390)
    for _ in range(40):
        sim.settle()
    sim.register("b")
    found = steps_until_merging(sim)
    assert found is not None and found <= 15, "steps of 10 ms"


def asked_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which the policy is asked."""
    asked: list[float] = []
    schedule = DLoRA.schedule

    def noted(self: DLoRA, view: SchedulerView) -> Decision:
        asked.append(view.now)
        return schedule(self, view)

    monkeypatch.setattr(DLoRA, "schedule", noted)
    return asked


@pytest.mark.parametrize("alone", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("payback", [0.0, 0.5, 3.0])
def test_it_is_asked_seldom_and_merges_in_the_same_step(
    alone: float, payback: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> int | None:
        sim = sim_of(f"dlora:alone={alone},payback={payback}")
        sim.add("a", max_tokens=390)
        for _ in range(25):
            sim.settle()
        sim.add("a", max_tokens=20)
        return steps_until_merging(sim, 390)

    asked = asked_of(monkeypatch)
    seldom, count = found(), len(asked)
    monkeypatch.setattr(DLoRA, "quiet_until", lambda self, view: -math.inf)
    assert found() == seldom
    assert count <= 25


@pytest.mark.parametrize("saved", [0.0, -0.001])
def test_it_is_not_asked_at_every_step_where_a_merge_never_pays(
    saved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(monkeypatch)
    costs = Costs()
    costs.saved = saved
    sim = sim_of(costs=costs)
    sim.add("a", max_tokens=390)
    sim.run()
    assert not sim.merges and len(asked) <= 15


@pytest.mark.parametrize("text", ["dlora:alone=-1", "dlora:payback=-1"])
def test_options_out_of_range_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=text.partition(":")[2].partition("=")[0]):
        load_policy(text)
