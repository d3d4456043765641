"""Every way that a load can go wrong, while others run: it harms only those who need that adapter."""

from __future__ import annotations

import asyncio
import gc
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from support.engine_fixtures import MakeEngine, Tiny, greedy
from support.failure_harness import Reads, error_of, under_load, until
from support.peft_files import CONFIG, WEIGHTS, edit_config, edit_weights

from aioengine import AdapterInfo, AsyncEngine
from aioengine.errors import (
    AdapterInvalid,
    AdapterLoadError,
    AdapterNotFound,
    AdapterTooLarge,
    AioEngineError,
    ConfigError,
    EngineDead,
    EngineStopped,
)
from aioengine.events import AdapterFailed


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the adapter "rank-3"."""
    return shutil.copytree(tiny.adapters["rank-3"], tmp_path / "bad")


def spoil_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change a B of the adapter."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(tensors) if "v_proj.lora_B" in key)
        tensors[key] = change(tensors[key]).contiguous()

    return lambda folder: edit_weights(folder, edit)


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


FILES: dict[str, tuple[Callable[[Path], Any], type[AioEngineError], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), AdapterInvalid, CONFIG),
    "the folder has vanished": (shutil.rmtree, AdapterLoadError, "folder"),
    "truncated": (truncate, AdapterInvalid, "truncated"),
    "NaN": (spoil_weights(nan), AdapterInvalid, "NaN"),
    "wrong shape": (spoil_weights(lambda t: torch.zeros(33, t.shape[1])), AdapterInvalid, "33"),
    "rank over max": (lambda f: edit_config(f, r=32), AdapterTooLarge, "max_lora_rank"),
}
"""One of each kind; tests/adapters has what else can be wrong with files."""


@pytest.mark.parametrize("case", FILES)
@pytest.mark.slow
async def test_files(case: str, tiny: Tiny, make_engine: MakeEngine, folder: Path) -> None:
    """Its requests fail, each once; it stays registered, and works when it has been repaired."""
    spoil, kind, word = FILES[case]
    async with make_engine(tiny, max_loras=3, max_cpu_loras=4) as engine, under_load(engine, tiny):
        failures: list[AdapterFailed] = []
        engine.add_listener(failures.append, AdapterFailed)
        engine.register_adapter("bad", folder)
        spoil(folder)
        requests = [engine.complete([3 + i], greedy(4), adapter="bad") for i in range(3)]
        for error in await asyncio.gather(*requests, return_exceptions=True):
            assert type(error) is kind, error
            for part in ("'bad'", str(folder), word):
                assert part in str(error)
        assert len(failures) == 1, "one read, and no further one until it is asked for again"
        assert type(await error_of(engine.load_adapter("bad"))) is kind
        assert type(await error_of(engine.load_adapter("new", folder))) is kind
        assert "new" not in [info.name for info in engine.adapters()]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny.adapters["rank-3"], folder)
        out = await engine.complete([4, 5], greedy(8), adapter="bad")
        assert out.token_ids == tiny.expected([4, 5], 8, "rank-3")


@pytest.mark.slow
async def test_a_disk_that_hangs(tiny: Tiny, make_engine: MakeEngine, reads: Reads, folder: Path) -> None:
    """Its requests fail after the timeout, and the place for a read is free again. While it hangs others of
    this folder fail at once; when it has ended the folder is read again."""
    fields = {"max_loras": 3, "max_cpu_loras": 6, "max_concurrent_loads": 1, "load_timeout": 1.0}
    async with make_engine(tiny, **fields) as engine, under_load(engine, tiny):
        engine.register_adapter("slow", folder)
        engine.register_adapter("third", tiny.adapters["rank-4"])
        with reads.hang("slow") as gate:
            failing = asyncio.create_task(error_of(engine.complete([4], greedy(4), adapter="slow")))
            await gate.reached()
            third = await engine.complete([4, 5], greedy(8), adapter="third")
            assert third.token_ids == tiny.expected([4, 5], 8, "rank-4")
            error = await failing
            assert isinstance(error, AdapterLoadError)
            for word in ("'slow'", str(folder), "load_timeout=1 seconds"):
                assert word in str(error)
            again = await error_of(engine.complete([4], greedy(4), adapter="slow"))
            assert "an earlier read of this folder hangs" in str(again) and reads.count["slow"] == 1
        async with asyncio.timeout(60):
            while not isinstance(await load_or_error(engine, "slow"), AdapterInfo):
                await asyncio.sleep(0.01)
        out = await engine.complete([4, 5], greedy(8), adapter="slow")
        assert out.token_ids == tiny.expected([4, 5], 8, "rank-3")


async def load_or_error(engine: AsyncEngine, name: str) -> AdapterInfo | AdapterLoadError:
    try:
        return await engine.load_adapter(name)
    except AdapterLoadError as error:
        return error


@pytest.mark.slow
async def test_stopping_does_not_wait_for_a_disk_that_hangs(
    tiny: Tiny, make_engine: MakeEngine, reads: Reads
) -> None:
    async with make_engine(tiny, load_timeout=None) as engine:
        engine.register_adapter("slow", tiny.adapters["rank-3"])
        with reads.hang("slow") as gate:
            waiting = [
                asyncio.create_task(error_of(engine.complete([4], greedy(4), adapter="slow"))),
                asyncio.create_task(error_of(engine.load_adapter("slow"))),
                asyncio.create_task(error_of(engine.load_adapter("new", tiny.adapters["rank-3"]))),
            ]
            await gate.reached()
            async with asyncio.timeout(60):
                await engine.stop()
                assert {type(error) for error in await asyncio.gather(*waiting)} == {EngineStopped}
            engine.check_invariants()


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.slow
async def test_unloading_does_not_wait_for_a_disk_that_hangs(
    registered: bool, force: bool, tiny: Tiny, make_engine: MakeEngine, reads: Reads, folder: Path
) -> None:
    """The loads under way and those behind them fail, the only place for a read is free, and what comes of
    the read in the end is dropped."""
    fields = {"max_loras": 3, "max_cpu_loras": 6, "max_concurrent_loads": 1, "load_timeout": None}
    async with make_engine(tiny, **fields) as engine, under_load(engine, tiny):
        if registered:
            engine.register_adapter("x", folder)
        with reads.hang("x") as gate:
            loads = [asyncio.create_task(error_of(engine.load_adapter("x", folder))) for _ in range(2)]
            await gate.reached()
            async with asyncio.timeout(60):
                await asyncio.gather(engine.unload_adapter("x", force=force), *loads)
            for load in loads:
                assert isinstance(load.result(), AdapterLoadError)
                assert "'x'" in str(load.result()) and "unloaded" in str(load.result())
            engine.register_adapter("third", tiny.adapters["rank-4"])
            third = await engine.complete([4, 5], greedy(8), adapter="third")
            assert third.token_ids == tiny.expected([4, 5], 8, "rank-4")
            assert isinstance(await error_of(engine.unload_adapter("x")), AdapterNotFound)
        assert reads.count["x"] == 1


async def test_a_bound_in_which_the_largest_adapter_could_never_be_served(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    engine = make_engine(tiny, max_cpu_lora_bytes="1KiB")
    with pytest.raises(ConfigError, match=r"max_cpu_lora_bytes=1024: must be at least \d+.*max_lora_rank=16"):
        await engine.start()


async def test_who_waits_for_an_adapter_when_the_engine_dies_is_told(
    tiny: Tiny, make_engine: MakeEngine, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aioengine.model.runner import ModelRunner

    async with make_engine(tiny, max_concurrent_loads=1) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        running = asyncio.create_task(error_of(engine.complete([4], greedy(100), adapter="x")))
        await until(lambda: engine.stats().running == 1)
        unloading = asyncio.create_task(engine.unload_adapter("x"))
        with reads.hang("slow") as gate:
            loads = [
                asyncio.create_task(error_of(engine.load_adapter(name, tiny.adapters["rank-4"])))
                for name in ("slow", "next")
            ]
            await gate.reached()

            def broken(*_: Any) -> None:
                raise MemoryError("out of device memory")

            monkeypatch.setattr(ModelRunner, "execute", broken)
            async with asyncio.timeout(60):
                errors = await asyncio.gather(running, *loads)
                await unloading
        assert {type(error) for error in errors} == {EngineDead}
        engine.check_invariants()


@pytest.mark.parametrize("kind", [StopIteration, asyncio.CancelledError, GeneratorExit, SystemExit])
async def test_whatever_a_step_raises_is_told_to_who_waits(
    kind: type[BaseException], tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aioengine.model.runner import ModelRunner

    def broken(*_: Any) -> None:
        raise kind("deep inside")

    async with make_engine(tiny, executor="thread") as engine:
        monkeypatch.setattr(ModelRunner, "execute", broken)
        async with asyncio.timeout(60):
            with pytest.raises(EngineDead, match=rf"a step raised {kind.__name__}\('deep inside'\)"):
                await engine.complete([4], greedy(4))


async def test_what_a_failed_read_has_read_is_not_kept(
    tiny: Tiny, make_engine: MakeEngine, folder: Path
) -> None:
    """Failures are remembered by name, and with a traceback the file's content would be, too."""

    def frames() -> list[str]:
        gc.collect()
        found = [item for item in gc.get_objects() if isinstance(item, TracebackType)]
        return [name for item in found if "aioengine" in (name := item.tb_frame.f_code.co_filename)]

    truncate(folder)
    files = [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    async with make_engine(tiny, max_loras=3, max_cpu_loras=4) as engine:
        for name in "cd":
            engine.register_adapter(name, folder)
        attempts: list[Callable[[], Awaitable[object]]] = [
            lambda: engine.load_adapter("a", folder),
            lambda: engine.load_adapter_files("b", *files),
            lambda: engine.complete([1, 2, 3], greedy(1), adapter="c"),
            lambda: asyncio.gather(*(engine.complete([1], greedy(1), adapter="d") for _ in range(3))),
        ]
        before = frames()
        for attempt in attempts:
            with pytest.raises(AdapterInvalid) as caught:
                await attempt()
            del caught
            await until(lambda: frames() == before)
