"""A policy that is not asked while nothing happens decides as one that is asked before every step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aioengine.core import CoreLimits
from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.registry import load_policy
from aioengine.testing import LIMITS, Sim

MIXED = "8:.7,16:.2,64:.1"
FILES = ("requests.csv", "slots.csv", "moves.csv", "samples.csv")


def files_of(folder: Path, policy: str, slot_memory: str | None = None, **fields: Any) -> dict[str, bytes]:
    workload = WorkloadSpec(
        arrivals="gamma:rate=30,cv=3",
        limit=120,
        adapters=12,
        popularity="zipf:0.8",
        prompt_tokens="uniform:20..900",
        output_tokens="uniform:5..80",
        **fields,
    )
    experiment = Experiment(
        workload=workload,
        policy=policy,
        slots=3 if slot_memory is None else 6,
        cpu_loras=6,
        max_num_seqs=8,
        slot_memory=slot_memory,
        max_lora_rank=64,
    )
    run(experiment, folder)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("fcfs", {}),
        ("fcfs:max_wait=0.2", {"tenants": 2}),
        ("vllm+lru", {}),
        ("drainer:patience=0.3", {}),
        ("fcfs+gdsf+none", {"timeout": 4.0}),
        ("fcfs", {"slot_memory": "600MiB", "ranks": MIXED}),
        ("vllm+lru", {"slot_memory": "600MiB", "ranks": MIXED, "timeout": 4.0}),
        ("fcfs+gdsf:max_wait=0.2", {"slot_memory": "600MiB", "ranks": MIXED}),
        ("drainer:patience=0.3", {"slot_memory": "600MiB", "ranks": MIXED}),
    ],
)
@pytest.mark.slow
def test_the_same_bytes_come_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, fields: dict[str, Any]
) -> None:
    asked: Counter[bool] = Counter()
    schedule = Composed.schedule

    def counted(self: Composed, view: SchedulerView) -> Decision:
        asked[quiet] += 1
        return schedule(self, view)

    monkeypatch.setattr(Composed, "schedule", counted)
    quiet = True
    found = files_of(tmp_path / "quiet", policy, **fields)
    monkeypatch.setattr(Composed, "quiet_until", lambda self, view: -math.inf)
    quiet = False
    assert files_of(tmp_path / "asked", policy, **fields) == found
    if "tenants" not in fields:
        few = 0.95 if fields.get("slot_memory") else 0.9  # asked while a request waits for memory
        assert asked[True] < few * asked[False]


class Sleeps(SchedulerPolicy):
    """Decides nothing, and says for how long."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.asked: list[float] = []

    def schedule(self, view: SchedulerView) -> Decision:
        self.asked.append(view.now)
        waiting = [request.request_id for request in view.waiting] if len(self.asked) == 1 else []
        return Decision(admit=waiting)

    def quiet_until(self, view: SchedulerView) -> float:
        return self.until


def test_it_is_asked_again_at_its_time_or_when_something_happens() -> None:
    policy = Sleeps(until=0.5)
    sim = Sim(LIMITS._replace(num_blocks=200), policy)
    sim.add(max_tokens=50)
    for _ in range(4):
        sim.settle(step_seconds=0.1)
    assert len(policy.asked) == 2, "it admits, then has nothing to decide"
    sim.add(max_tokens=2)
    sim.settle(step_seconds=0.1)
    assert policy.asked[-1] == pytest.approx(0.4), "a request has come"
    for _ in range(3):
        sim.settle(step_seconds=0.1)
    assert policy.asked[-1] == pytest.approx(0.7), "its time has come, and it says no other"


@pytest.mark.parametrize("says", [False, True])
def test_a_class_that_overrides_schedule_alone_is_asked_before_every_step(says: bool) -> None:
    """It inherits a promise about another ``schedule``."""

    class Counting(FCFS):
        calls = 0

        def schedule(self, view: SchedulerView) -> Decision:
            Counting.calls += 1
            return super().schedule(view)

        if says:

            def quiet_until(self, view: SchedulerView) -> float:
                return super().quiet_until(view)

    sim = Sim(LIMITS, Counting())
    sim.add(max_tokens=30)
    sim.run()
    assert (Counting.calls >= 30) is not says


def asked(limits: CoreLimits) -> tuple[Sim, Callable[[], int]]:
    """A simulation of ``fcfs``, and how often it has been asked."""
    policy = FCFS()
    count = 0
    schedule = policy.schedule

    def counted(view: SchedulerView) -> Decision:
        nonlocal count
        count += 1
        return schedule(view)

    policy.schedule = counted  # type: ignore[method-assign]
    return Sim(limits, policy), lambda: count


def test_nothing_is_asked_after_an_admission_that_leaves_nothing_to_decide() -> None:
    sim, count = asked(LIMITS._replace(num_blocks=200))
    sim.add(max_tokens=50)
    for _ in range(5):
        sim.settle(step_seconds=0.1)
    assert count() == 1
    sim.add(max_tokens=50)
    for _ in range(5):
        sim.settle(step_seconds=0.1)
    assert count() == 2


def test_a_request_for_an_adapter_that_others_wait_for_is_no_question() -> None:
    sim, count = asked(LIMITS._replace(num_blocks=200, cpu_capacity=4))
    for name in "abc":
        sim.register(name)
    for name in "abc":
        sim.add(name, max_tokens=60)
    for _ in range(5):
        sim.settle(step_seconds=0.001)
    before = count()
    for _ in range(5):
        sim.add("c")
        sim.settle(step_seconds=0.001)
    assert count() == before, "both slots are busy, and others wait for it already"
    sim.add("a", max_tokens=2)
    sim.settle(step_seconds=0.001)
    assert count() > before, "its adapter is in a slot"


@pytest.mark.parametrize("policy", ["fcfs:max_wait=0.5", "drainer:patience=0.3"])
@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("wanted", ["a", "b", "c", None])
@pytest.mark.slow
def test_a_policy_that_comes_while_nobody_waits_knows_who_runs(
    policy: str, names: str, wanted: str | None
) -> None:
    """Another tenant's request is served as soon as with a policy that is always asked."""
    found = []
    for always in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if always:
                patch.setattr(Composed, "quiet_until", lambda self, view: -math.inf)
            limits = LIMITS._replace(num_blocks=400, max_model_len=200, max_num_seqs=4, cpu_capacity=4)
            sim = Sim(limits, load_policy(policy))
            for name in "abc":
                sim.register(name)
            for name in (names * 4)[:4]:
                sim.add(name, max_tokens=150, tenant="x")
            for _ in range(8):
                sim.settle(step_seconds=0.1)
            assert len(sim.core.running) == 4 and not sim.core.queues
            sim.core.guard.change(load_policy(policy))
            for _ in range(3):
                sim.settle(step_seconds=0.1)
            other = sim.add(wanted, tenant="y")
            sim.run()
            assert other.first_token is not None
            found.append(other.first_token - other.arrival)
    assert found[0] == found[1]


class AdmitsOne(FCFS):
    """Overrides what the promises are about."""

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        return decision._replace(admit=decision.admit[:1])

    def quiet_until(self, view: SchedulerView) -> float:
        return super().quiet_until(view)


def test_a_promise_about_another_schedule_does_not_count() -> None:
    sim = Sim(LIMITS, AdmitsOne())
    for _ in range(3):
        sim.add(max_tokens=8)
    sim.settle()
    sim.settle()
    assert len(sim.core.running) == 2


scenes = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(
            ["fcfs", "fcfs:max_wait=0.1", "fcfs:fair=false", "vllm+lru", "drainer:patience=0.2", "discard"]
        ),
        "slots": st.integers(1, 4),
        "max_num_seqs": st.integers(1, 8),
        "kv_cache_memory": st.sampled_from([None, "300MiB"]),
        "slot_memory": st.sampled_from([None, None, "600MiB"]),
        "replicas": st.sampled_from([None, None, 2]),
    }
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scenes, st.integers(0, 3), st.sampled_from([2.0, 20.0, 60.0]), st.sampled_from([0, 0, 2]))
def test_any_run_is_the_same_if_the_policy_is_always_asked(
    tmp_path_factory: pytest.TempPathFactory, scene: dict[str, Any], seed: int, rate: float, tenants: int
) -> None:
    workload = WorkloadSpec(
        arrivals=f"gamma:rate={rate},cv=3",
        limit=60,
        adapters=9,
        popularity="zipf:0.8",
        ranks=MIXED,
        prompt_tokens="uniform:20..900",
        output_tokens="uniform:1..80",
        tenants=tenants,
    )
    experiment = Experiment(
        workload=workload, cpu_loras=5, max_lora_rank=64, max_model_len=1200, seed=seed, **scene
    )
    found = []
    for always in (False, True):
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            if always:
                patch.setattr(Composed, "quiet_until", lambda self, view: -math.inf)
            run(experiment, folder)
        found.append([(folder / name).read_bytes() for name in FILES])
    assert found[0] == found[1]
