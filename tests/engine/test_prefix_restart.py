"""Prefixes in files while worker processes are lost and started again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from support.engine_fixtures import MakeEngine, Tiny, prompt_of
from support.prefix_files import PIN, PREFIX, SCORED, Moves, files, running, stuck_reads
from support.process_harness import NothingLeft, worker_pids
from support.waiting import until

from aioengine.events import EngineRestarted, Event
from aioengine.runtime.prefixes.files import PrefixFiles

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX"),
    pytest.mark.usefixtures("preloaded_workers"),
]
PROCESS = {"executor": "process", "restart": "on-failure"}


class Restarts:
    """How often an engine's workers were started again."""

    def __init__(self, moves: Moves) -> None:
        self.count = 0
        moves.engine.add_listener(self._handle)

    def _handle(self, event: Event) -> None:
        self.count += isinstance(event, EngineRestarted)

    async def reach(self, count: int) -> None:
        await until(lambda: self.count >= count)


def kill_worker() -> int:
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)
    return pid


async def save(make_engine: MakeEngine, tiny: Tiny, folder: Path) -> None:
    async with running(make_engine, tiny, folder) as moves:
        await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        await moves.saved()


@pytest.mark.usefixtures("faulty")
@pytest.mark.slow
async def test_a_request_for_a_saved_prefix_waits_for_the_workers_and_does_not_harm_them(
    tiny: Tiny,
    make_engine: MakeEngine,
    nothing_left: NothingLeft,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await save(make_engine, tiny, tmp_path / "kv")
    held, read = tmp_path / "held", list[str]()
    monkeypatch.setattr(PrefixFiles, "read", lambda self, name, about: read.append(name))
    async with running(make_engine, tiny, tmp_path / "kv", **PROCESS) as moves:
        engine, restarts = moves.engine, Restarts(moves)
        held.touch()
        monkeypatch.setenv("AIOENGINE_TEST_START", str(held))
        old = kill_worker()
        await until(lambda: engine.degraded)
        await until(lambda: worker_pids() not in ([], [old]))
        asked = asyncio.create_task(engine.complete(PREFIX, SCORED, cache_pins=[PIN]))
        await until(lambda: engine.stats().waiting == 1 or asked.done())
        assert engine.degraded and restarts.count == 0
        assert not read, "there are no blocks for it"
        held.unlink()
        output = await asked
        assert output.token_ids == tiny.expected(PREFIX, 6) and output.cached_tokens == 0
        assert restarts.count == 1
        engine.check_invariants()
    await nothing_left.check()


@pytest.mark.slow
async def test_workers_that_have_loaded_other_files_name_no_prefix(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    tiny = tiny._replace(model=model)
    async with running(make_engine, tiny, tmp_path / "kv", **PROCESS) as moves:
        restarts = Restarts(moves)
        await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        await moves.saved()
        kill_worker()
        await restarts.reach(1)
        output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        assert (output.cached_tokens, moves.count("loaded")) == (40, 1), "the same files were loaded again"
        os.utime(next(model.glob("*.safetensors")), (1, 1))
        kill_worker()
        await restarts.reach(2)
        output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        assert (output.cached_tokens, moves.count("loaded")) == (0, 1)
        await moves.engine.complete(prompt_of(2, 41), SCORED, cache_pins=[PIN])
    assert sum("have changed" in record.message for record in caplog.records) == 1
    assert len(files(tmp_path / "kv")) == 1


@pytest.mark.slow
async def test_a_read_that_began_before_the_workers_were_lost_is_not_for_the_next(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have loaded another model."""
    await save(make_engine, tiny, tmp_path)
    async with running(make_engine, tiny, tmp_path, **PROCESS) as moves:
        restarts = Restarts(moves)
        with stuck_reads(monkeypatch) as (begun, go_on):
            asked = asyncio.create_task(moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN]))
            await begun.wait()
            kill_worker()
            await restarts.reach(1)
            go_on.set()
            output = await asked
        assert output.token_ids == tiny.expected(PREFIX, 6)
        assert (output.cached_tokens, moves.count("loaded"), restarts.count) == (0, 0, 1)
