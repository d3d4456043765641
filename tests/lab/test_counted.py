"""Decodes that are counted in simulation come to the same as those that are written down one by one."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lab_sim import config, costs

from aioengine import RequestOutput, SamplingParams, events
from aioengine.core.core import Core, Step
from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.runtime.output import SoFar
from aioengine.schedulers import Decision, SchedulerView
from aioengine.schedulers.parts.compose import Composed
from aioengine.step import StepBatch

systems = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(
            ["fcfs", "fcfs:max_wait=0.1", "sjf", "vtc", "drr", "admission", "priority"]
        ),
        "slots": st.integers(1, 4),
        "max_num_seqs": st.integers(1, 12),
        "max_num_batched_tokens": st.sampled_from([64, 512]),
        "block_size": st.sampled_from([1, 4, 16]),
        "kv_cache_memory": st.sampled_from([None, "160MiB", "300MiB"]),
        "slot_memory": st.sampled_from([None, None, "600MiB"]),
        "seed": st.integers(0, 5),
    }
)
loads = st.fixed_dictionaries(
    {
        "arrivals": st.sampled_from(["gamma:rate=30,cv=3", "poisson:rate=4"]),
        "adapters": st.sampled_from([0, 3, 12]),
        "tenants": st.sampled_from([0, 0, 2]),
        "prompt_tokens": st.sampled_from(["uniform:1..40", "uniform:20..700"]),
        "output_tokens": st.sampled_from([1, 2, 3, "uniform:1..120"]),
        "lengths": st.sampled_from(["known", "hidden:max=200"]),
        "timeout": st.sampled_from([None, None, 1.5]),
    }
)


def outcome(experiment: Experiment, *, counts: bool, seen: list[StepBatch] | None = None) -> dict[str, bytes]:
    """The files of a run. All counts are checked at each decision."""
    schedule = Core.schedule

    def checked(core: Core, now: float, again: StepBatch | None = None) -> Step:
        core.check()
        step = schedule(core, now, again)
        if seen is not None and step.batch is not None:
            seen.append(step.batch)
        return step

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Core, "schedule", checked)
        if not counts:
            patch.setattr(Core, "count_decodes", lambda *args: None)
        run(experiment, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(loads, systems)
def test_the_same_bytes_come_out(load: dict[str, Any], system: dict[str, Any]) -> None:
    workload = WorkloadSpec(limit=40, popularity="zipf:1.0", ranks="8:.7,16:.2,64:.1", **load)
    experiment = Experiment(workload=workload, max_lora_rank=64, max_model_len=1000, **system)
    assert outcome(experiment, counts=True) == outcome(experiment, counts=False)


def test_nearly_all_decodes_are_counted() -> None:
    workload = WorkloadSpec(arrivals="poisson:rate=30", limit=100, adapters=8, output_tokens="uniform:50..90")
    seen: list[StepBatch] = []
    outcome(Experiment(workload=workload, slots=4, kv_cache_memory="2GiB"), counts=True, seen=seen)
    written = sum(len(batch.sequences) for batch in seen)
    assert sum(batch.counted.sequences for batch in seen if batch.counted is not None) > 3 * written


deeds = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "cancel", "look", "look"]),
        st.sampled_from([0.0, 0.01, 0.05, 0.2, 1.0]),
    ),
    min_size=3,
    max_size=25,
)


def seen_by(todo: Sequence[tuple[str, float]], *, counts: bool) -> list[tuple[float, ...]]:
    """What callers see of requests, of which each is also looked at before its end."""

    async def main() -> list[tuple[float, ...]]:
        found: list[tuple[float, ...]] = []
        loop = asyncio.get_running_loop()
        limits = config(max_num_seqs=3, max_num_batched_tokens=16, enable_prefix_caching=False)
        async with SimulatedEngine(limits, costs(), metrics=False) as engine:
            engine.add_listener(lambda event: found.append((event.time,)), events.RequestEnded)
            engine.add_adapters([AdapterShape(name, 8) for name in "ab"])
            running: list[asyncio.Task[RequestOutput]] = []
            outputs: list[SoFar] = []
            for kind, seconds in todo:
                await asyncio.sleep(seconds)
                number = len(running)
                if kind == "add":
                    engine.set_length(f"r{number}", 7 + 9 * number)
                    wanted = engine.complete(
                        [0] * (3 + 5 * number),
                        SamplingParams(max_tokens=90),
                        adapter=(None, "a", "b", {"a": 0.5, "b": 0.25})[number % 4],
                        request_id=f"r{number}",
                        follow=outputs.append,
                    )
                    running.append(asyncio.create_task(wanted))
                elif kind == "cancel" and running:
                    running[number // 2].cancel()
                elif kind == "look":
                    stats, load = engine.stats(), engine.load()
                    found.append((loop.time(), stats.output_tokens, stats.kv_blocks_free, stats.steps))
                    found.append((load.running, load.waiting, load.running_tokens, load.kv_tokens_free))
                    shown = [output for so_far in outputs if (output := so_far()) is not None]
                    found += [(loop.time(), len(one.token_ids), one.last_token or 0.0) for one in shown]
                    engine.check_invariants()
            for task in running:
                with suppress(asyncio.CancelledError):
                    found.append((loop.time(), len((await task).token_ids)))
            engine.check_invariants()
        return found

    with pytest.MonkeyPatch.context() as patch:
        if not counts:
            patch.setattr(Core, "count_decodes", lambda *args: None)
        return run_in_virtual_time(main())


@settings(max_examples=40, deadline=None)
@given(deeds)
@pytest.mark.slow
def test_who_looks_in_between_sees_the_same(todo: Sequence[tuple[str, float]]) -> None:
    assert seen_by(todo, counts=True) == seen_by(todo, counts=False)


def test_tokens_left_by_adapter_are_those_of_the_running_requests() -> None:
    workload = WorkloadSpec(arrivals="poisson:rate=30", limit=100, adapters=8, output_tokens="uniform:50..90")
    schedule = Composed.schedule
    found: list[tuple[list[tuple[str | None, int]], list[tuple[str | None, int]]]] = []

    def noted(self: Composed, view: SchedulerView) -> Decision:
        left: dict[str | None, int] = {}
        for request in view.running:
            tokens = request.max_tokens - request.output_tokens
            left[request.adapter] = max(tokens, left.get(request.adapter, 0))
        found.append(([*view.tokens_left.items()], [*left.items()]))
        return schedule(self, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Composed, "schedule", noted)
        outcome(Experiment(workload=workload, slots=4, kv_cache_memory="2GiB"), counts=True)
    assert all(seen == running for seen, running in found)
    assert max(len(running) for _, running in found) > 3
