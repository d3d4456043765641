"""Pinned adapters: in their slot when the call returns, and what that means for the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, register

from aioengine import AdapterInfo, AsyncEngine
from aioengine.errors import (
    AdapterNotFound,
    ConfigError,
    EngineOverloaded,
    EngineStopped,
)


def info(engine: AsyncEngine, name: str) -> AdapterInfo:
    return next(a for a in engine.adapters() if a.name == name)


@asynccontextmanager
async def occupied(engine: AsyncEngine, tiny: Tiny, *names: str) -> AsyncIterator[None]:
    """While requests run on these adapters; they end with the block, or when they are aborted by the
    adapter's name."""
    register(engine, tiny, *names)
    streams = [engine.generate([4, 5], greedy(500), adapter=name, request_id=name) for name in names]
    await asyncio.gather(*(anext(stream) for stream in streams))
    try:
        yield
    finally:
        for stream in streams:
            await stream.aclose()


async def test_a_cancelled_pin_is_none(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, max_model_len=512) as engine:
        async with occupied(engine, tiny, "rank-3", "qv-only"):
            await engine.load_adapter("p", tiny.adapters["rank-4"])
            pin = asyncio.create_task(engine.pin_adapter("p"))
            await asyncio.sleep(0)
            assert info(engine, "p").pinned
            pin.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pin
            assert not info(engine, "p").pinned
        assert (await engine.load_adapter("q", tiny.adapters["regex"], pin=True)).location == "slot"
        engine.check_invariants()


async def test_a_pin_ends_if_it_is_unpinned_unloaded_or_the_engine_stops(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    async with (
        make_engine(tiny, max_model_len=512) as engine,
        occupied(engine, tiny, "rank-3", "qv-only"),
    ):
        await engine.load_adapter("p", tiny.adapters["rank-4"])
        unpinned = asyncio.create_task(engine.pin_adapter("p"))
        await asyncio.sleep(0)
        await engine.unpin_adapter("p")
        assert not (await unpinned).pinned
        unloaded = asyncio.create_task(engine.pin_adapter("p"))
        await asyncio.sleep(0)
        await engine.unload_adapter("p")
        with pytest.raises(AdapterNotFound, match="unloaded"):
            await unloaded
        await engine.load_adapter("p", tiny.adapters["rank-4"])
        stopped = asyncio.create_task(engine.pin_adapter("p"))
        await asyncio.sleep(0)
        await engine.stop()
        with pytest.raises(EngineStopped):
            await stopped


async def test_one_slot_stays_free_unless_it_is_forced(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        await engine.load_adapter("a", tiny.adapters["rank-3"], pin=True)
        again = await engine.load_adapter("a", pin=True)
        assert again.pinned, "the same one again"
        await engine.load_adapter("b", tiny.adapters["qv-only"])
        with pytest.raises(ConfigError, match=r"max_loras=2 .*\(a\)"):
            await engine.pin_adapter("b")
        assert (await engine.pin_adapter("b", force=True)).location == "slot"
        engine.register_adapter("c", tiny.adapters["rank-4"])
        with pytest.raises(ConfigError, match=r"\(a, b\)"):
            await engine.pin_adapter("c", force=True)
        assert info(engine, "c").location == "disk"


async def test_with_every_slot_pinned_the_others_fail(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, max_model_len=512, max_cpu_loras=4) as engine:
        await engine.load_adapter("a", tiny.adapters["rank-3"], pin=True)
        async with occupied(engine, tiny, "qv-only"):
            engine.register_adapter("c", tiny.adapters["rank-4"])
            waiting = asyncio.create_task(engine.complete([4, 5], greedy(2), adapter="c"))
            engine.register_adapter("b", tiny.adapters["regex"])
            pin = asyncio.create_task(engine.pin_adapter("b", force=True))
            while not any(a.name == "b" and a.pinned for a in engine.adapters()):
                await asyncio.sleep(0.001)
            await engine.abort("qv-only")
            with pytest.raises(EngineOverloaded, match=r"'c'.*pinned.*\(a, b\)"):
                await waiting
            assert (await pin).location == "slot"
        with pytest.raises(EngineOverloaded, match=r"'qv-only'"):
            await engine.complete([4, 5], greedy(2), adapter="qv-only")
        for name, reference in (("a", "rank-3"), ("b", "regex"), (None, None)):
            out = await engine.complete([4, 5], greedy(2), adapter=name)
            assert out.token_ids == tiny.expected([4, 5], 2, reference)
        await engine.unpin_adapter("b")
        out = await engine.complete([4, 5], greedy(2), adapter="c")
        assert out.token_ids == tiny.expected([4, 5], 2, "rank-4")


async def test_with_a_cpu_cache_full_of_pins_loads_fail(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, max_model_len=512, max_cpu_loras=2) as engine:
        await engine.load_adapter("a", tiny.adapters["rank-3"], pin=True)
        async with occupied(engine, tiny, "qv-only"):  # which cannot leave the cache meanwhile
            waiting = asyncio.create_task(engine.load_adapter("c", tiny.adapters["rank-4"]))
            await asyncio.sleep(0)
            await engine.pin_adapter("qv-only", force=True)
            with pytest.raises(EngineOverloaded, match=r"'c'.*CPU cache \(a, qv-only\)"):
                await waiting
        with pytest.raises(EngineOverloaded, match="max_cpu_loras"):
            await engine.load_adapter("a", tiny.adapters["rank-4"], replace=True)
        assert info(engine, "a").version == 1
        assert sorted(a.name for a in engine.adapters()) == ["a", "qv-only"]
        engine.check_invariants()


async def test_a_new_version_takes_over_the_pin(tiny: Tiny, make_engine: MakeEngine) -> None:
    """Even if all slots are pinned, requests accepted before end on the old version."""
    async with make_engine(tiny, max_num_seqs=1) as engine:
        await engine.load_adapter("a", tiny.adapters["rank-3"], pin=True)
        engine.register_adapter("b", tiny.adapters["qv-only"])
        await engine.pin_adapter("b", force=True)
        old = [asyncio.create_task(engine.complete([4, 5], greedy(20), adapter="a")) for _ in range(3)]
        while engine.stats().running == 0:
            await asyncio.sleep(0)
        replaced = await engine.load_adapter("a", tiny.adapters["rank-4"], replace=True)
        assert (replaced.version, replaced.pinned) == (2, True)
        new = await engine.complete([4, 5], greedy(4), adapter="a")
        for task in old:
            assert (await task).token_ids == tiny.expected([4, 5], 20, "rank-3")
        assert new.token_ids == tiny.expected([4, 5], 4, "rank-4")
        assert {s.adapter: s.version for s in engine.stats().slots} == {"a": 2, "b": 1}
