"""Under an overload the slots that are closed are found together, as they would be one by one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aioengine.core.state import Request
from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.schedulers.parts.slot_pool import Claim, SlotPool, fill

FILES = ("requests.csv", "slots.csv", "moves.csv", "samples.csv")
close_for = SlotPool.close_for


def overload(policy: str, limit: int = 60, rate: float = 60.0, **system: Any) -> Experiment:
    workload = WorkloadSpec(
        arrivals=f"gamma:rate={rate},cv=3",
        limit=limit,
        adapters=12,
        popularity="zipf:0.8",
        ranks="8:.7,16:.2,64:.1",
        prompt_tokens="uniform:20..900",
        output_tokens="uniform:1..80",
    )
    return Experiment(workload=workload, policy=policy, max_lora_rank=64, max_model_len=1200, **system)


scenes = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(
            ["fcfs:max_wait=0.05", "sjf:max_wait=0.1", "edf+gdsf:max_wait=0.05", "fcfs"]
        ),
        "slots": st.integers(2, 6),
        "cpu_loras": st.sampled_from([6, 8, 12]),
        "max_cpu_lora_bytes": st.sampled_from([None, "1GiB"]),
        "max_num_seqs": st.integers(3, 12),
        "seed": st.integers(0, 3),
        "rate": st.sampled_from([20.0, 60.0, 200.0]),
    }
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scenes)
def test_the_same_bytes_come_out(tmp_path_factory: pytest.TempPathFactory, scene: dict[str, Any]) -> None:
    experiment = overload(**scene)
    found = []
    for alone in (False, True):
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            if alone:
                patch.setattr(SlotPool, "may_lose_idle", lambda *_, **__: True)
            run(experiment, folder)
        found.append([(folder / name).read_bytes() for name in FILES])
    assert found[0] == found[1]


def test_simultaneous_requests_for_closed_slots_come_in_an_order_that_no_set_determines() -> None:
    names = [f"adapter-{number:03}" for number in range(40)]

    def waiting_for(name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(adapter=name, arrival=1.0, max_tokens=3, output_tokens=0)]

    view: Any = SimpleNamespace(waiting_for=waiting_for)
    found = fill(view, set(names), dict.fromkeys(reversed(names), 5), 1.0)
    assert [request.adapter for request in found] == names[::-1]


def test_it_is_so_in_many_decisions(tmp_path_factory: pytest.TempPathFactory) -> None:
    found: list[int] = []

    def counted(self: SlotPool, claims: Iterator[Claim]) -> list[str]:
        closed = close_for(self, claims)
        found.append(len(closed))
        return closed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotPool, "close_for", counted)
        run(
            overload("fcfs:max_wait=0.05", 200, slots=3, cpu_loras=12, max_num_seqs=8),
            tmp_path_factory.mktemp("run"),
        )
    assert found.count(3) > 5, "all slots"
    assert any(0 < closed < 3 for closed in found), "some slots"


@pytest.mark.slow
def test_decisions_and_requests_leave_nothing_to_the_garbage_collector(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    earlier = kept()  # other tests' own
    try:
        run(overload("fcfs:max_wait=0.05", 100, slots=3, cpu_loras=12, max_num_seqs=8), tmp_path)
        assert kept().keys() == earlier.keys()
    finally:
        gc.enable()


def kept() -> dict[int, object]:
    """Pools of slots and requests that exist."""
    return {id(thing): thing for thing in gc.get_objects() if isinstance(thing, SlotPool | Request)}
