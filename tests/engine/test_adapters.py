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
from aioengine.events import AdapterLoading


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


async def test_replace_lets_accepted_requests_end_on_the_old_version(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    async with make_engine(tiny) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        prompt = prompt_of(3, 6)
        stream = engine.generate(prompt, greedy(80), adapter="x")
        await anext(stream)
        replaced = await engine.load_adapter("x", tiny.adapters["qv-only"], replace=True)
        assert replaced.version == 2
        new = await engine.complete(prompt, greedy(), adapter="x")
        assert new.token_ids == tiny.expected(prompt, 24, "qv-only")
        async for out in stream:
            pass
        assert out.token_ids == tiny.expected(prompt, 80, "rank-3")
        await engine.complete([1], greedy(1))
        stats = engine.stats()
        assert [s.version for s in stats.slots if s.adapter == "x"] == [2], "the old slot is free"
        assert stats.cpu_adapters == 1
        engine.check_invariants()


async def test_a_bad_replacement_leaves_the_old_version_in_place(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    async with make_engine(tiny) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterInvalid):
            await engine.load_adapter("x", tmp_path, replace=True)
        out = await engine.complete([4, 5], greedy(), adapter="x")
        assert out.token_ids == tiny.expected([4, 5], 24, "rank-3")
        assert [a.version for a in engine.adapters()] == [1]


async def test_another_path_needs_replace(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        with pytest.raises(AdapterInvalid, match="replace=True"):
            await engine.load_adapter("x", tiny.adapters["qv-only"])
        with pytest.raises(AdapterInvalid, match="replace=True"):
            engine.register_adapter("x", tiny.adapters["qv-only"])


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


async def test_a_replacement_is_read_once_and_shares_no_blocks(tiny: Tiny, make_engine: MakeEngine) -> None:
    """The same prompt before and after: the prefix cache has it, but never for the other version."""
    prompt, reads = prompt_of(5, 30), list[Any]()
    async with make_engine(tiny) as engine:
        engine.add_listener(reads.append, AdapterLoading)
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        for cached in (0, 28):
            out = await engine.complete(prompt, greedy(), adapter="x")
            assert out.token_ids == tiny.expected(prompt, 24, "rank-3")
            assert out.cached_tokens == cached
        await engine.load_adapter("x", tiny.adapters["qv-only"], replace=True)
        for cached in (0, 28):
            out = await engine.complete(prompt, greedy(), adapter="x")
            assert out.token_ids == tiny.expected(prompt, 24, "qv-only")
            assert out.cached_tokens == cached
    assert [event.version for event in reads] == [1, 2]


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
