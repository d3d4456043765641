"""The engine with its model in another process: the same as with a thread, and ends as cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, greedy, prompt_of, register
from support.failure_harness import error_of, last_of, until
from support.process_harness import NothingLeft, worker_pids

from aioengine import AsyncEngine, SamplingParams
from aioengine.errors import (
    AdapterInvalid,
    AdapterLoadError,
    AdapterTooLarge,
    ConfigError,
    EngineDead,
    EngineStopped,
    RequestInvalid,
)
from aioengine.executors.process import spawn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


class Even:
    """A constraint that a worker could not import."""

    def allowed(self, output: Sequence[int]) -> bytes:
        if len(output) == 5:
            raise ValueError("five are enough")
        return b"\x55" * 32


SAMPLINGS: dict[str, SamplingParams] = {
    "drawn": SamplingParams(temperature=0.9, top_k=40, seed=-5, max_tokens=20, ignore_eos=True),
    "penalties": SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={9: 3.0}, max_tokens=20, logprobs=3
    ),
    "stop": SamplingParams(max_tokens=30, stop_token_ids=[11, 12, 13, 14, 15, 16]),
    "constraint": SamplingParams(constraint=Even(), max_tokens=5, temperature=0.5, seed=2**64 - 1),
}


async def sampled(engine: AsyncEngine) -> tuple[list[Any], list[float]]:
    """Tokens, and log-probabilities, whose last bits depend on the batch."""
    runs = [engine.complete(prompt_of(i, 9), params) for i, params in enumerate(SAMPLINGS.values())]
    outputs = await asyncio.gather(*runs)
    logprobs = [entry.logprob for out in outputs for entry in out.logprobs or ()]
    return [(out.token_ids, out.finish_reason) for out in outputs], logprobs


async def load_errors(engine: AsyncEngine, tiny: Tiny, folder: Path) -> list[BaseException]:
    """What three bad adapters are refused with."""
    bad = shutil.copytree(tiny.adapters["rank-3"], folder / "bad", dirs_exist_ok=True)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    found = []
    for name, path in (("bad", bad), ("large", tiny.adapters["all-modules"]), ("gone", folder / "nowhere")):
        found.append(await error_of(engine.load_adapter(name, path)))
    return found


@pytest.mark.usefixtures("preloaded_workers")
@pytest.mark.slow
async def test_tokens_and_errors_are_those_of_the_thread_executor(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft, tmp_path: Path
) -> None:
    limits: dict[str, Any] = {"max_num_batched_tokens": 16, "max_lora_rank": 8, "load_retries": 1}
    engines = [make_engine(tiny, executor=name, **limits) for name in ("thread", "process")]
    seen, values = [], []
    for engine in engines:
        async with engine:
            names = ("rank-3", "qv-only", "rank-4")
            register(engine, tiny, *names)
            asked = [(prompt_of(i, 5 + 6 * i), name) for i, name in enumerate((None, *names))]
            for cached in (False, True):  # adapters take turns in two slots, and the prefix cache has prompts
                outputs = await check_tokens(engine, tiny, asked)
                assert {output.cached_tokens > 0 for output in outputs} == {cached}
            error = await error_of(engine.complete([5], SamplingParams(constraint=Even(), max_tokens=9)))
            assert isinstance(error, RequestInvalid) and "five are enough" in str(error)
            failed = await load_errors(engine, tiny, tmp_path)
            assert [type(e) for e in failed] == [AdapterInvalid, AdapterTooLarge, AdapterLoadError]
            infos = [(a.rank, a.bytes, a.digest) for a in engine.adapters()]
            tokens, logprobs = await sampled(engine)
            seen.append((tokens, [(str(e), vars(e)) for e in failed], str(error), infos))
            values.append(logprobs)
            engine.check_invariants()
            assert engine.plan.num_blocks == engine.stats().kv_blocks == engine.stats().kv_blocks_free
    thread, process = seen
    assert process == thread and values[1] == pytest.approx(values[0], abs=1e-4)
    await nothing_left.check()


@pytest.mark.usefixtures("preloaded_workers")
async def test_a_worker_that_is_killed_fails_all_at_once_and_leaves_nothing(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft
) -> None:
    async with make_engine(tiny, executor="process", max_num_seqs=1) as engine:
        streams = [engine.generate(prompt_of(i, 5), greedy(100)) for i in range(2)]
        rest = [asyncio.create_task(last_of(stream)) for stream in streams]
        await until(lambda: engine.stats().output_tokens > 3)
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGKILL)
        errors = [await error_of(task) for task in rest]
        assert all(isinstance(error, EngineDead) for error in errors)
        assert f"worker 0 (process {pid}) was killed by SIGKILL" in str(errors[0])
        assert engine.state == "dead"
        with pytest.raises(EngineDead):
            await engine.complete([5])
        await until(lambda: not worker_pids())
    await nothing_left.check()


@pytest.mark.usefixtures("faulty")
async def test_stopped_or_cancelled_while_it_starts(
    tiny: Tiny,
    make_engine: MakeEngine,
    nothing_left: NothingLeft,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = tmp_path / "held"
    held.touch()
    monkeypatch.setenv("AIOENGINE_TEST_START", str(held))
    engine = make_engine(tiny, executor="process")
    starting = asyncio.create_task(engine.start())
    await until(lambda: bool(worker_pids()))
    for _ in range(5):  # by somebody who has no patience
        starting.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not worker_pids()
    engine = make_engine(tiny, executor="process")
    starting = asyncio.create_task(engine.start())
    await until(lambda: bool(worker_pids()))
    await engine.stop()
    held.unlink()
    assert isinstance(await error_of(starting), EngineStopped)
    await nothing_left.check()


@pytest.mark.usefixtures("preloaded_workers")
async def test_a_start_that_fails_says_what_it_would_in_this_process(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"nothing")
    errors: list[BaseException] = []
    for executor in ("thread", "process"):
        engine = make_engine(tiny._replace(model=model), executor=executor)
        errors.append(await error_of(engine.start()))
    assert type(errors[1]) is type(errors[0]) is ConfigError
    assert str(errors[1]) == str(errors[0])
    await nothing_left.check()


@pytest.mark.parametrize(
    ("mine", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_how_threads_wait_is_the_workers_business_or_the_users(
    mine: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    assert spawn.worker_environment().get("GOMP_SPINCOUNT") == expected


@pytest.mark.slow
async def test_two_engines_at_once_and_signals_for_the_terminal(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft
) -> None:
    async with make_engine(tiny, executor="process") as one, make_engine(tiny, executor="process") as two:
        pids = worker_pids()
        assert len(pids) == 2
        assert all(os.getpgid(pid) != os.getpgid(0) for pid in pids), "out of the reach of Ctrl-C"
        for pid in pids:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        await one.stop()
        await check_tokens(two, tiny, [([5, 6], None)])
    await nothing_left.check()


PROGRAM = """
    import asyncio, os, signal, sys
    import psutil
    from aioengine import AsyncEngine, EngineConfig, SamplingParams

    async def run():
        config = EngineConfig(
            model=sys.argv[1], dtype="float32", kv_cache_memory="1MiB", max_model_len=64, executor="process"
        )
        async with AsyncEngine(config) as engine:
            out = await engine.complete([5, 6], SamplingParams(max_tokens=5, ignore_eos=True))
            print(out.token_ids)
            print([child.pid for child in psutil.Process().children()], flush=True)
            assert "torch" not in sys.modules
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(run())
"""


@pytest.mark.slow
def test_a_program_without_a_main_guard_that_is_killed_takes_its_workers_along(
    tiny: Tiny, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    (tmp_path / "random.py").write_text("raise ImportError('a module of the current folder')")
    command = [sys.executable, "-P", str(program), str(tiny.model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tokens, pids = done.stdout.splitlines()
    assert json.loads(tokens) == tiny.expected([5, 6], 5)
    (pid,) = json.loads(pids)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)
