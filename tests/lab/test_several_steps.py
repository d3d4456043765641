"""Simulations that take several steps at once, where nothing can happen, give the same bytes as others."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.asked_always import asked_always
from support.lab_sim import config, costs

from aioengine import SamplingParams, events
from aioengine.core.core import Core, Step
from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.device import SimulatedDevice
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape

POLICIES = [
    "fcfs",
    "fcfs:max_wait=0.2",
    "fcfs+gdsf",
    "fair",
    "vllm+lru",
    "discard",
    "lpm",
    "sjf",
    "chameleon",
    "vtc",
]
workloads = st.fixed_dictionaries(
    {
        "arrivals": st.sampled_from(["gamma:rate=30,cv=3", "poisson:rate=4", "onoff:rate=20,on=1,off=2"]),
        "limit": st.integers(1, 40),
        "adapters": st.sampled_from([0, 3, 12]),
        "popularity": st.sampled_from(["uniform", "zipf:1.0"]),
        "ranks": st.sampled_from([16, "8:.7,16:.2,64:.1"]),
        "tenants": st.sampled_from([0, 0, 2]),
        "prompt_tokens": st.sampled_from(["uniform:1..40", "uniform:20..900"]),
        "output_tokens": st.sampled_from([1, 2, 17, "uniform:1..120"]),
        "lengths": st.sampled_from(["known", "hidden:max=200"]),
        "deadline": st.sampled_from([None, None, 1.5]),
        "sessions": st.sampled_from([None, None, "chat:turns=3,think=0.2"]),
    }
)
systems = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "slots": st.integers(1, 4),
        "max_num_seqs": st.integers(1, 12),
        "max_num_batched_tokens": st.sampled_from([64, 512]),
        "block_size": st.sampled_from([4, 16]),
        "kv_cache_memory": st.sampled_from([None, "300MiB"]),
        "enable_prefix_caching": st.booleans(),
        "slot_memory": st.sampled_from([None, None, "600MiB"]),
        "replicas": st.sampled_from([None, None, 2, 5]),
        "router": st.sampled_from(["affinity", "round_robin", "tiers"]),
        "seed": st.integers(0, 3),
    }
)


def outcome(
    experiment: Experiment,
    *,
    repeats: bool,
    decided: list[int] | None = None,
) -> dict[str, bytes]:
    """The files of a run."""
    schedule = Core.schedule

    def counted_schedule(core: Core, now: float) -> Step:
        if decided is not None:
            decided[0] += 1
        return schedule(core, now)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedDevice, "repeats", repeats)
        patch.setattr(Core, "schedule", counted_schedule)
        run(experiment, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(workloads, systems)
@example(  # a prompt whose last token is computed alone
    {
        "arrivals": "gamma:rate=30,cv=3",
        "limit": 14,
        "adapters": 3,
        "popularity": "uniform",
        "ranks": 16,
        "prompt_tokens": "uniform:20..900",
        "output_tokens": 17,
        "sessions": "chat:turns=3,think=0.2",
    },
    {
        "policy": "fcfs",
        "slots": 1,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "enable_prefix_caching": False,
        "replicas": None,
        "seed": 1,
    },
)
def test_the_same_bytes_come_out(workload: dict[str, Any], system: dict[str, Any]) -> None:
    """Also where the policy is asked before every step, although it said that it had nothing to add."""
    if system["replicas"] is None:
        system = {key: value for key, value in system.items() if key != "router"}
    experiment = Experiment(
        workload=WorkloadSpec(**workload),
        cpu_loras=6,
        max_lora_rank=64,
        max_model_len=1200,
        on_too_long="truncate",
        **system,
    )
    assert outcome(experiment, repeats=True) == outcome(experiment, repeats=False)
    found = []
    for says in (True, False):
        asked = asked_always(system["policy"], says=says)
        files = outcome(msgspec.structs.replace(experiment, policy=asked), repeats=True)
        found.append([files[name] for name in ("requests.csv", "slots.csv", "moves.csv", "samples.csv")])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("replicas", "rate", "share"), [(None, 1, 0.1), pytest.param(4, 0.2, 0.6, marks=pytest.mark.slow)]
)
def test_most_steps_are_not_taken_one_by_one(replicas: int | None, rate: float, share: float) -> None:
    workload = WorkloadSpec(
        arrivals=f"poisson:rate={rate}",
        limit=20,
        adapters=5,
        prompt_tokens="uniform:20..200",
        output_tokens=200,
    )
    experiment = Experiment(workload=workload, slots=4, cpu_loras=5, replicas=replicas)
    taken, jumped = [0], [0]
    assert outcome(experiment, repeats=False, decided=taken) == outcome(
        experiment, repeats=True, decided=jumped
    )
    assert jumped[0] < taken[0] * share


def test_one_event_tells_of_equal_steps() -> None:
    """And a listener that names other events hears of nothing else."""

    async def main() -> tuple[list[events.Event], list[events.Event]]:
        steps, ends = list[events.Event](), list[events.Event]()
        async with SimulatedEngine(config(max_num_seqs=3, max_num_batched_tokens=64), costs()) as engine:
            engine.add_listener(steps.append, events.StepFinished)
            engine.add_listener(ends.append, events.RequestEnded, events.FirstToken)
            params = [SamplingParams(max_tokens=20 + 30 * number, ignore_eos=True) for number in range(3)]
            await asyncio.gather(*(engine.complete([0] * 40, each) for each in params))
        return steps, ends

    def told(repeats: bool) -> tuple[list[tuple[int, ...]], list[events.Event], float, int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SimulatedDevice, "repeats", repeats)
            steps, ends = run_in_virtual_time(main())
        single, seconds = [], 0.0
        for step in steps:
            assert isinstance(step, events.StepFinished)
            seconds += step.seconds
            single += [(step.step + i, step.decode_tokens, *step.slots) for i in range(step.steps)]
        return single, ends, seconds, len(steps)

    (single, ends, seconds, _), (expanded, same, total, count) = told(False), told(True)
    assert expanded == single and total == pytest.approx(seconds) and count < len(single) / 2
    assert ends == same and {type(e) for e in ends} == {events.FirstToken, events.RequestEnded}


@pytest.mark.parametrize("repeats", [False, True])
def test_requests_that_are_ended_from_outside_keep_what_they_have(repeats: bool) -> None:
    async def made(ends: Literal["abort", "unload"]) -> int:
        async with SimulatedEngine(config(max_num_seqs=3, max_num_batched_tokens=64), costs()) as engine:
            engine.add_adapters([AdapterShape("a", 8)])
            params = SamplingParams(max_tokens=400, ignore_eos=True)
            asked = asyncio.create_task(engine.complete([0] * 20, params, adapter="a", request_id="r"))
            await asyncio.sleep(1.234567)
            if ends == "abort":
                await engine.abort("r")
            else:
                await engine.unload_adapter("a", force=True)
            return len((await asked).token_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedDevice, "repeats", repeats)
        aborted, unloaded = (run_in_virtual_time(made(ends)) for ends in ("abort", "unload"))
    assert aborted == unloaded > 40
