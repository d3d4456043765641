"""A policy that is not asked while nothing happens decides as one that is asked before every step."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.core_sim import LIMITS, CoreSim

from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.policies.fcfs import FCFS

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
        kv_cache_memory="1500MiB" if slot_memory == "shared" else None,
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
        ("fcfs+gdsf:max_wait=0.2", {"slot_memory": "shared", "ranks": MIXED}),
        ("drainer:patience=0.3", {"slot_memory": "shared", "ranks": MIXED}),
    ],
)
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
        few = 0.95 if fields.get("slot_memory") == "shared" else 0.9  # asked while a request waits for memory
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
    sim = CoreSim(LIMITS._replace(num_blocks=200), policy)
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

    sim = CoreSim(LIMITS, Counting())
    sim.add(max_tokens=30)
    sim.run()
    assert (Counting.calls >= 30) is not says
