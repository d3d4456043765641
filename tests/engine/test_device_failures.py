"""A GPU fails while requests run, wait and load: what ends, what starts again, and what everybody sees."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.failure_harness import error_of, until
from support.faulty_worker import BAD, fail_as
from support.process_harness import NothingLeft
from support.selection import mostly_slow
from support.server_fixtures import served_by

from aioengine.errors import AdapterLoadError, DeviceError, DeviceOutOfMemory
from aioengine.events import EngineRestarted
from aioengine.model.runner import ModelRunner
from aioengine.model.slots.pool import LoRASlots
from aioengine.step import StepBatch, StepResult

KINDS = {"memory": DeviceOutOfMemory, "illegal": DeviceError, "lost": DeviceError}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("fault", mostly_slow(KINDS, "memory", "illegal"))
@pytest.mark.slow
async def test_with_processes_only_what_ran_fails(
    fault: str,
    tiny: Tiny,
    make_engine: MakeEngine,
    nothing_left: NothingLeft,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("AIOENGINE_TEST_FAULT", fault)
    kind, held = KINDS[fault], tmp_path / "held"
    async with (
        make_engine(tiny, executor="process", restart="on-failure", max_num_seqs=1) as engine,
        served_by(engine) as served,
    ):
        seen: list[EngineRestarted] = []
        engine.add_listener(seen.append, EngineRestarted)
        assert engine.failure is None
        held.touch()
        monkeypatch.setenv("AIOENGINE_TEST_START", str(held))
        bad = asyncio.create_task(engine.complete(BAD))
        waits = asyncio.create_task(engine.complete(prompt_of(1, 5), greedy(8)))
        error = await error_of(bad)
        assert type(error) is kind and kind.__name__ in str(error)
        await until(lambda: engine.degraded)
        assert engine.failure is error
        health, ready = [(await served.http.get(path)) for path in ("/health", "/ready")]
        assert (health.status_code, health.json()) == (200, {"status": "running", "cause": kind.__name__})
        assert ready.json() == {"status": "degraded", "cause": kind.__name__}
        held.unlink()
        assert (await waits).token_ids == tiny.expected(prompt_of(1, 5), 8)
        assert [event.error for event in seen] == [error]
        assert engine.failure is None
        assert (await served.http.get("/health")).json() == {"status": "running"}
    await nothing_left.check()


async def test_without_processes_the_engine_ends_with_the_cause(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = ModelRunner.execute

    def failing(self: ModelRunner, batch: StepBatch) -> StepResult:
        if any(list(work.tokens) == BAD for work in batch.sequences):
            fail_as("memory")
        return execute(self, batch)

    monkeypatch.setattr(ModelRunner, "execute", failing)
    async with make_engine(tiny, max_num_seqs=1) as engine, served_by(engine) as served:
        tasks = [asyncio.create_task(engine.complete(tokens)) for tokens in (BAD, [5])]
        errors = [await error_of(task) for task in tasks]
        assert type(errors[0]) is DeviceOutOfMemory and errors[1] is errors[0]
        assert isinstance(errors[0].__cause__, torch.OutOfMemoryError)
        assert engine.state == "dead" and engine.failure is await engine.until_dead() is errors[0]
        health = await served.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead", "cause": "DeviceOutOfMemory"})
        answer = await served.http.post("/v1/completions", json={"model": "tiny", "prompt": [5]})
        assert answer.status_code == 503 and answer.headers["retry-after"]


async def test_a_copy_into_a_slot_that_fails_so_is_no_fault_of_the_adapter(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LoRASlots, *_: object) -> None:
        fail_as("illegal")

    monkeypatch.setattr(LoRASlots, "write", failing)
    async with make_engine(tiny) as engine:
        error = await error_of(engine.load_adapter("a", tiny.adapters["rank-3"], pin=True))
        assert type(error) is DeviceError and engine.state == "dead"


async def test_too_little_memory_for_an_adapter_harms_nobody_else(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LoRASlots, *_: object) -> None:
        fail_as("memory")

    monkeypatch.setattr(LoRASlots, "write", failing)
    async with make_engine(tiny) as engine:
        await engine.load_adapter("a", tiny.adapters["rank-3"])
        error = await error_of(engine.complete([5], adapter="a"))
        assert type(error) is AdapterLoadError and "out of memory" in str(error)
        assert engine.state == "running" and (await engine.complete([5])).token_ids
