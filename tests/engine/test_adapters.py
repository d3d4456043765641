"""The life cycle of adapters through the engine: load, replace, pin, unload."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.tiny_chat import build_chat_model
from support.tiny_models import build_adapter

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.errors import AdapterInvalid, AdapterNotFound, ConfigError


async def test_register_does_nothing_until_it_is_needed(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        before = engine.register_adapter("r", tiny.adapters["rank-3"])
        assert (before.location, before.version, before.rank, before.digest) == ("disk", 1, 0, "")
        out = await engine.complete([4, 5], greedy(), adapter="r")
        assert out.token_ids == tiny.expected([4, 5], 24, "rank-3")
        (after,) = engine.adapters()
        assert (after.location, after.rank, after.slot) == ("slot", 3, 0)
        assert after.bytes > 0
        assert engine.register_adapter("r", tiny.adapters["rank-3"]) == after, "again: no change"


async def test_unload_waits_for_what_runs_and_frees_everything(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        stream = engine.generate([4, 5], greedy(60), adapter="x")
        await anext(stream)
        unloading = asyncio.create_task(engine.unload_adapter("x"))
        await asyncio.sleep(0)
        with pytest.raises(AdapterNotFound, match="'x'"):
            await engine.complete([4], adapter="x")
        assert engine.adapters() == []
        async for out in stream:
            pass
        assert out.token_ids == tiny.expected([4, 5], 60, "rank-3")
        await unloading
        stats = engine.stats()
        assert {slot.state for slot in stats.slots} == {"FREE"}
        assert stats.cpu_adapters == 0
        with pytest.raises(AdapterNotFound):
            await engine.unload_adapter("x")


async def test_without_lora_adapters_are_refused(tiny: Tiny) -> None:
    config = EngineConfig(
        model=str(tiny.model), dtype="float32", max_model_len=64, kv_cache_memory="1MiB", lora=None
    )
    async with AsyncEngine(config) as engine:
        out = await engine.complete([4, 5], greedy())
        assert out.token_ids == tiny.expected([4, 5], 24)
        with pytest.raises(ConfigError, match="lora=None"):
            await engine.load_adapter("x", tiny.adapters["rank-3"])
        with pytest.raises(AdapterNotFound):
            await engine.complete([4, 5], adapter="x")
        assert engine.stats().slots == ()


async def test_a_request_that_is_tokenized_while_its_adapter_is_replaced(tmp_path: Path) -> None:
    """It gets the new version: nothing keeps the old one, which no request has yet."""
    model = build_chat_model(tmp_path / "model")
    old, new = (build_adapter(model, tmp_path / str(seed), seed=seed, r=4) for seed in (1, 2))
    config = EngineConfig(
        model=str(model), dtype="float32", block_size=4, kv_cache_memory="2MiB",
        lora=LoRAConfig(max_loras=2, max_cpu_loras=3),
    )  # fmt: skip
    chat, go_on = [{"role": "user", "content": "hello " * 40}], threading.Event()
    async with AsyncEngine(config) as engine:
        await engine.load_adapter("x", old)
        busy = [asyncio.create_task(engine.text_work.run(3000, go_on.wait)) for _ in range(2)]
        asked = asyncio.create_task(engine.complete(chat, SamplingParams(max_tokens=4), adapter="x"))
        await asyncio.sleep(0)
        await engine.load_adapter("x", new, replace=True)
        go_on.set()
        await asyncio.gather(*busy)
        out = await asked
        assert (
            out.token_ids
            == (await engine.complete(chat, SamplingParams(max_tokens=4), adapter="x")).token_ids
        )
        with pytest.raises(AdapterNotFound):
            await engine.load_adapter("x@1")


async def test_the_same_content_is_a_new_version_that_keeps_its_blocks(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    prompt = prompt_of(6, 30)
    async with make_engine(tiny) as engine:
        first = await engine.load_adapter("x", tiny.adapters["rank-3"])
        before = await engine.complete(prompt, greedy(), adapter="x")
        second = await engine.load_adapter("x", tiny.adapters["rank-3"], replace=True)
        assert (second.version, second.digest) == (2, first.digest)
        assert len(bytes.fromhex(first.digest)) == 32
        after = await engine.complete(prompt, greedy(), adapter="x")
        assert after.token_ids == before.token_ids
        assert after.cached_tokens == 28


@pytest.mark.parametrize("path", [None, 5, b"x", "", "a\0b"])
async def test_bad_paths(path: Any, tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        with pytest.raises(AdapterInvalid, match="path="):
            engine.register_adapter("x", path)
