"""Two ranks, each in a process: the tokens of one, adapters that swap, and all or none of everything."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

import pytest
from engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from failure_harness import error_of, until
from process_harness import NothingLeft, worker_pids

from aioengine.errors import AdapterLoadError, EngineDead

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("fully", [False, True], ids=["half sharded", "fully sharded"])
async def test_two_ranks_give_the_tokens_of_one_while_adapters_swap(
    tiny_of: Callable[[str], Tiny], make_engine: MakeEngine, nothing_left: NothingLeft, fully: bool
) -> None:
    tiny = tiny_of("qwen2" if fully else "llama")
    names = ("rank-3", "qv-only", "patterns", "rslora")
    async with make_engine(
        tiny, executor="process", tensor_parallel_size=2, fully_sharded_loras=fully
    ) as engine:
        assert len(worker_pids()) == 2
        for name in names:
            engine.register_adapter(name, tiny.adapters[name])
        work = [(i, adapter) for i, adapter in enumerate((None, *names, None, *names))]
        runs = [engine.complete(prompt_of(i, 7), greedy(12), adapter=a) for i, a in work]
        for (i, adapter), out in zip(work, await asyncio.gather(*runs), strict=True):
            assert out.token_ids == tiny.expected(prompt_of(i, 7), 12, adapter)
        assert engine.stats().slot_evictions > 0
        for name in ("fail-1", "fail-0"):
            error = await error_of(engine.load_adapter(name, tiny.adapters["rank-3"]))
            assert isinstance(error, AdapterLoadError) and "a rank's disk is broken" in str(error)
        info = await engine.load_adapter("again", tiny.adapters["rank-3"], pin=True)
        assert info.location == "slot" and info.bytes > 0
        engine.check_invariants()
    await nothing_left.check()


@pytest.mark.usefixtures("faulty")
async def test_a_rank_that_is_killed_or_fails_takes_the_other_along(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft
) -> None:
    fields = {"executor": "process", "tensor_parallel_size": 2, "restart": "on-failure", "max_model_len": 500}
    async with make_engine(tiny, **fields) as engine:
        running = asyncio.create_task(engine.complete([5], greedy(490)))
        await until(lambda: engine.stats().output_tokens > 2)
        pid = worker_pids()[1]
        os.kill(pid, signal.SIGKILL)
        error = await error_of(running)
        assert isinstance(error, EngineDead) and f"(process {pid}) was killed by SIGKILL" in str(error)
        out = await engine.complete([5, 6], greedy(8))
        assert out.token_ids == tiny.expected([5, 6], 8)
        assert pid not in worker_pids() and len(worker_pids()) == 2
    await nothing_left.check()
