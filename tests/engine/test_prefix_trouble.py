"""A folder of prefixes that fails, hangs or changes holds up and fails no request."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_fixtures import MakeEngine, Tiny, prompt_of
from support.prefix_files import PIN, PREFIX, SCORED, files, running, stuck_reads

from aioengine import CachePin
from aioengine.errors import DeviceFault, EngineOverloaded, EngineStopped
from aioengine.model.kv_cache import KVCache
from aioengine.runtime.prefixes import keeper
from aioengine.runtime.prefixes.files import PrefixFiles


@pytest.mark.parametrize("adapter", [None, "a"])
async def test_a_request_that_waits_for_a_file_can_be_displaced(
    adapter: str | None, tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_engine, tiny, tmp_path, max_waiting=2) as moves:
        await moves.engine.load_adapter("a", tiny.adapters["qv-only"])
        with stuck_reads(monkeypatch) as (begun, go_on):
            first, newest = (
                asyncio.ensure_future(
                    moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN], adapter=adapter, tenant="a")
                )
                for _ in range(2)
            )
            await begun.wait()
            other = await moves.engine.complete([5], SCORED, tenant="b")
            assert other.token_ids == tiny.expected([5], 6)
            go_on.set()
            with pytest.raises(EngineOverloaded, match="tenant 'a' has most"):
                await newest
            await first


async def test_who_waits_for_a_file_when_the_engine_stops_is_told_so(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_engine, tiny, tmp_path) as moves:
        with stuck_reads(monkeypatch) as (begun, go_on):
            waits = asyncio.ensure_future(moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN]))
            await begun.wait()
            stops = asyncio.ensure_future(moves.engine.stop())
            with pytest.raises(EngineStopped):
                await waits
            go_on.set()
            await stops


async def test_a_folder_that_hangs_holds_up_neither_requests_nor_the_stop(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "PATIENCE", 0.01)
    monkeypatch.setattr(keeper, "CLOSING", 0.01)
    with stuck_reads(monkeypatch):
        async with running(make_engine, tiny, tmp_path) as moves:
            for seed in range(5):
                prompt = prompt_of(seed, 41)
                output = await moves.engine.complete(prompt, SCORED, cache_pins=[PIN])
                assert output.token_ids == tiny.expected(prompt, 6)
            await moves.saved(5)  # a write waits for no read


async def test_files_that_the_model_was_not_loaded_from_name_no_prefix(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    async with running(make_engine, tiny._replace(model=model), tmp_path / "kv") as moves:
        os.utime(next(model.glob("*.safetensors")), (1, 1))
        for _ in range(2):
            output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
            assert output.token_ids == tiny.expected(PREFIX, 6)
        assert sum("have changed" in record.message for record in caplog.records) == 1
    assert not files(tmp_path / "kv")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ((PrefixFiles, "read"), MemoryError()),
        ((PrefixFiles, "write"), RuntimeError("no")),
        ((KVCache, "copy_in"), KeyError("k.0")),
        ((KVCache, "copy_out"), torch.OutOfMemoryError("CUDA out of memory")),
    ],
    ids=["read", "write", "copy in", "copy out"],
)
@pytest.mark.slow
async def test_no_error_of_a_copy_fails_a_request(
    where: tuple[Any, str],
    error: Exception,
    tiny: Tiny,
    make_engine: MakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(make_engine, tiny, tmp_path) as moves:
        await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        await moves.saved()
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fail(*_: object) -> None:
        loop.call_soon_threadsafe(failed.set)
        raise error

    monkeypatch.setattr(*where, fail)
    async with running(make_engine, tiny, tmp_path) as moves:
        for prompt in (PREFIX, prompt_of(2, 41), prompt_of(3, 41)):
            output = await moves.engine.complete(prompt, SCORED, cache_pins=[PIN])
            assert output.token_ids == tiny.expected(prompt, 6)
        await failed.wait()
        assert moves.engine.state == "running"
    assert sum("kv_cache_dir" in record.message for record in caplog.records) <= 1


async def test_a_device_that_fails_in_a_copy_is_lost(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_engine, tiny, tmp_path) as moves:
        await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        await moves.saved()

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(KVCache, "copy_in", fail)
    async with running(make_engine, tiny, tmp_path) as moves:
        with pytest.raises(DeviceFault):
            await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])


async def test_a_file_is_read_only_if_there_is_room_for_it(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_engine, tiny, tmp_path) as moves:
        await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        await moves.saved()
    read: list[str] = []
    monkeypatch.setattr(PrefixFiles, "read", lambda self, name, about: read.append(name))
    small = {"kv_cache_memory": "96KiB", "max_prefix_pins": 1.0, "max_model_len": 112}
    async with running(make_engine, tiny, tmp_path, **small) as moves:
        output = await moves.engine.complete(prompt_of(2, 101), SCORED, cache_pins=[CachePin(tokens=100)])
        assert output.pinned_tokens == 100 and moves.engine.stats().kv_blocks < 35
        output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        assert output.token_ids == tiny.expected(PREFIX, 6)
    assert not read


async def test_without_room_in_the_cache_or_the_folder_requests_run(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(make_engine, tiny, tmp_path, kv_cache_dir_bytes=1000) as moves:
        output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        assert output.pinned_tokens == 40
    assert not files(tmp_path), "larger than the bound"
    folder = tmp_path / "gone"
    async with running(make_engine, tiny, folder) as moves:
        folder.rmdir()
        for seed in (1, 2):
            output = await moves.engine.complete(prompt_of(seed, 41), SCORED, cache_pins=[PIN])
            assert output.token_ids == tiny.expected(prompt_of(seed, 41), 6)
    assert sum("kv_cache_dir" in record.message for record in caplog.records) <= 1
