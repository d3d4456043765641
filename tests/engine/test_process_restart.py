"""Workers that are lost and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.failure_harness import error_of, last_of, until
from support.faulty_worker import BAD
from support.process_harness import NothingLeft, worker_pids

from aioengine import AsyncEngine
from aioengine.errors import DeadlineExceeded, EngineDead, EngineStopped
from aioengine.events import EngineRestarted, RequestEnded
from aioengine.executors.process import device

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX"),
    pytest.mark.usefixtures("preloaded_workers"),
]

RESTARTS = "aioengine_executor_restarts_total"


def restarts(engine: AsyncEngine) -> float | None:
    return engine.metrics.registry.get_sample_value(RESTARTS, {"engine": "default"})


def kill_worker() -> None:
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
async def test_only_what_ran_fails_and_the_adapters_come_back(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft
) -> None:
    async with make_engine(
        tiny, executor="process", restart="on-failure", max_num_seqs=2, max_model_len=400
    ) as engine:
        seen: list[EngineRestarted] = []
        engine.add_listener(seen.append, EngineRestarted)
        await engine.load_adapter("rank-3", tiny.adapters["rank-3"], pin=True)
        for name in ("qv-only", "rank-4"):
            engine.register_adapter(name, tiny.adapters[name])
        prompts = [prompt_of(i, 5) for i in range(4)]
        running = [
            asyncio.create_task(engine.complete(prompts[i], greedy(380), adapter=name))
            for i, name in enumerate(("qv-only", "rank-3"))
        ]
        await until(lambda: engine.stats().running == 2)
        waiting = [
            asyncio.create_task(engine.complete(prompts[i], greedy(20), adapter=name))
            for i, name in ((2, "rank-4"), (3, None))
        ]
        await until(lambda: engine.stats().waiting == 2)
        kill_worker()
        errors = [await error_of(task) for task in running]
        assert all(isinstance(e, EngineDead) and "SIGKILL" in str(e) for e in errors)
        assert engine.state == "running" and not seen
        for (i, adapter), task in zip(((2, "rank-4"), (3, None)), waiting, strict=True):
            assert (await task).token_ids == tiny.expected(prompts[i], 20, adapter)
        (event,) = seen
        assert event.error is errors[0] and event.seconds > 0
        assert restarts(engine) == 1
        await until(lambda: engine.adapters()[0].location == "slot")
        assert [(a.name, a.pinned) for a in engine.adapters()] == [
            ("rank-3", True),
            ("qv-only", False),
            ("rank-4", False),
        ]
        kill_worker()  # and once more, with nothing running
        await until(lambda: len(seen) == 2)
        again = await engine.complete(prompts[0], greedy(20), adapter="rank-3")
        assert again.token_ids == tiny.expected(prompts[0], 20, "rank-3")
        assert restarts(engine) == 2
        engine.check_invariants()
    await nothing_left.check()


@pytest.mark.usefixtures("faulty")
async def test_while_it_restarts_requests_wait_end_and_are_stopped(
    tiny: Tiny,
    make_engine: MakeEngine,
    nothing_left: NothingLeft,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with make_engine(tiny, executor="process", restart="on-failure") as engine:
        loading = asyncio.create_task(engine.load_adapter("hang", tiny.adapters["rank-3"]))
        await until(lambda: engine.stats().cpu_adapters == 1)
        held = tmp_path / "held"
        held.touch()
        monkeypatch.setenv("AIOENGINE_TEST_START", str(held))
        kill_worker()
        await until(lambda: engine.stats().cpu_adapters == 0)
        late = await error_of(engine.complete([5], deadline=0.05))
        assert isinstance(late, DeadlineExceeded)
        stream = engine.generate([5], request_id="gone")
        aborted = asyncio.create_task(last_of(stream))
        await until(lambda: engine.stats().waiting == 1)
        assert await engine.abort("gone") and await aborted == []
        waiting = asyncio.create_task(engine.complete([5]))
        await until(lambda: engine.stats().waiting == 1)
        assert not loading.done()
        await engine.stop()
        for task in (waiting, loading):
            assert isinstance(await error_of(task), EngineStopped)
    await nothing_left.check()


@pytest.mark.usefixtures("faulty")
async def test_an_engine_whose_workers_are_lost_too_often_dies(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that raises is a loss too."""
    monkeypatch.setattr(device, "MAX_RESTARTS", 1)
    async with make_engine(tiny, executor="process", restart="on-failure", max_num_seqs=1) as engine:
        ended: list[RequestEnded] = []
        engine.add_listener(ended.append, RequestEnded)
        bad = [asyncio.create_task(engine.complete(BAD)) for _ in range(2)]
        last = asyncio.create_task(engine.complete([5]))
        errors = [await error_of(task) for task in (*bad, last)]
        assert all(isinstance(error, EngineDead) for error in errors)
        assert "ArithmeticError" in str(errors[0]) and "ArithmeticError" in str(errors[1])
        assert "lost more than 1 times within 600 seconds" in str(errors[2])
        assert engine.state == "dead" and restarts(engine) == 1
        assert len(ended) == 3
    await nothing_left.check()
