"""Every public coroutine, cancelled at every point: nothing is left behind, and everything goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from support.cancel_at import Moment, cancel_everywhere
from support.engine_fixtures import MakeEngine, Tiny, greedy
from support.failure_harness import Held, assert_nothing_left, until

from aioengine import AsyncEngine
from aioengine.errors import AdapterNotFound

MOMENTS: tuple[Moment, ...] = ("waiting", "resuming")
PROMPT = [5, 6, 7]
TOKENS = 3


class Scene(NamedTuple):
    engine: AsyncEngine
    tiny: Tiny
    streams: list[Any]
    """Open ones, closed after each run."""

    async def close_streams(self) -> None:
        while self.streams:
            await self.streams.pop().aclose()


Work = Callable[[Scene], Coroutine[Any, Any, Any]]


class Case(NamedTuple):
    before: Work
    """The state that the work is started in, each time."""
    work: Work
    at_least: int
    """Points at which it can be cancelled."""


async def nothing(scene: Scene) -> None: ...


async def registered(scene: Scene) -> None:
    scene.engine.register_adapter("x", scene.tiny.adapters["rank-3"])


def loading(**options: bool) -> Work:
    return lambda scene: scene.engine.load_adapter("x", scene.tiny.adapters["rank-3"], **options)


loaded, replace = loading(), loading(replace=True)


async def generate(scene: Scene) -> None:
    async for _ in scene.engine.generate(PROMPT, greedy(TOKENS), adapter="x"):
        pass


async def replace_twice(scene: Scene) -> None:
    """The second waits for the first, and is the one that is cancelled."""
    first = asyncio.create_task(replace(scene))
    await asyncio.sleep(0)
    try:
        await replace(scene)
    finally:
        await first


async def running(scene: Scene) -> None:
    """A request on it that goes on until somebody aborts it."""
    await loaded(scene)
    stream = scene.engine.generate(PROMPT, greedy(100), adapter="x", request_id="long")
    await anext(stream)
    scene.streams.append(stream)


async def drain(scene: Scene) -> None:
    """With a request that was accepted before."""
    task = asyncio.create_task(scene.engine.complete(PROMPT, greedy(TOKENS), adapter="x"))
    await asyncio.sleep(0)
    try:
        await scene.engine.drain()
    finally:
        await task


CASES: dict[str, Case] = {
    "generate, cold": Case(registered, generate, 1),
    "generate, warm": Case(loaded, generate, 1),
    "complete": Case(nothing, lambda scene: scene.engine.complete(PROMPT, greedy(TOKENS)), 1),
    "load": Case(nothing, loaded, 1),
    "load, registered": Case(registered, loaded, 1),
    "load, pinned": Case(nothing, loading(pin=True), 1),
    "replace": Case(loaded, replace, 1),
    "replace, before it was read": Case(registered, replace, 1),
    "replace, twice": Case(loaded, replace_twice, 2),
    "pin, cold": Case(registered, lambda scene: scene.engine.pin_adapter("x"), 1),
    "pin, warm": Case(loaded, lambda scene: scene.engine.pin_adapter("x"), 0),
    "unload": Case(loaded, lambda scene: scene.engine.unload_adapter("x"), 1),
    "unload, forced": Case(running, lambda scene: scene.engine.unload_adapter("x", force=True), 1),
    "abort": Case(running, lambda scene: scene.engine.abort("long"), 0),
}


@asynccontextmanager
async def watched(engine: AsyncEngine) -> AsyncIterator[Held]:
    """Nothing is left at the end that was not there at the start."""
    await engine.complete(PROMPT, greedy(1))  # threads start with the first use
    held = Held()
    yield held
    await assert_nothing_left(engine)
    await held.check()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", CASES)
async def test_cancelled_at_every_point(
    name: str, moment: Moment, tiny: Tiny, make_engine: MakeEngine
) -> None:
    before, work, at_least = CASES[name]
    async with make_engine(tiny, max_loras=2, max_cpu_loras=3) as engine:
        scene = Scene(engine, tiny, [])
        engine.register_adapter("beside", tiny.adapters["rank-4"])
        await engine.complete(PROMPT, greedy(1), adapter="beside")
        await loaded(scene)
        await engine.complete(PROMPT, greedy(1), adapter="x")  # both copies have been made once
        await engine.unload_adapter("x")
        async with watched(engine):

            async def start() -> None:
                await before(scene)

            async def after() -> None:
                """The same name is used again, from whatever state it is in now."""
                await scene.close_streams()
                engine.check_invariants()
                if "x" not in [info.name for info in engine.adapters()]:
                    await registered(scene)
                outs = await asyncio.gather(
                    engine.complete(PROMPT, greedy(TOKENS), adapter="x"),
                    engine.complete(PROMPT, greedy(TOKENS), adapter="beside"),
                )
                assert outs[0].token_ids == tiny.expected(PROMPT, TOKENS, "rank-3")
                assert outs[1].token_ids == tiny.expected(PROMPT, TOKENS, "rank-4")
                await engine.unload_adapter("x")
                await assert_nothing_left(engine)
                await start()

            await start()
            cancelled = await cancel_everywhere(lambda: work(scene), moment, after)
            assert cancelled >= at_least
            await scene.close_streams()
            with contextlib.suppress(AdapterNotFound):
                await engine.unload_adapter("x")


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_drain_that_is_cancelled_at_any_point(
    moment: Moment, tiny: Tiny, make_engine: MakeEngine
) -> None:
    """It is undone, and what had been accepted is served all the same. One that ends is for good."""
    ended = False
    engine = make_engine(tiny)
    await engine.start()
    try:
        scene = Scene(engine, tiny, [])
        await registered(scene)
        await engine.complete(PROMPT, greedy(1), adapter="x")

        async def after() -> None:
            nonlocal ended
            ended = engine.state != "running"
            if not ended:
                out = await engine.complete(PROMPT, greedy(TOKENS), adapter="x")
                assert out.token_ids == tiny.expected(PROMPT, TOKENS, "rank-3")

        async with watched(engine):
            assert await cancel_everywhere(lambda: drain(scene), moment, after) >= 1
        assert ended
    finally:
        await engine.stop()


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_start_that_is_cancelled_at_any_point(
    moment: Moment, tiny: Tiny, make_engine: MakeEngine
) -> None:
    held = Held()
    engines: list[AsyncEngine] = []

    def start() -> Coroutine[Any, Any, Any]:
        engines.append(make_engine(tiny))
        return engines[-1].start()

    async def after() -> None:
        if engines[-1].state == "running":
            out = await engines[-1].complete(PROMPT, greedy(TOKENS))
            assert out.token_ids == tiny.expected(PROMPT, TOKENS)
        await engines[-1].stop()
        await held.check()

    list(tiny.expected(PROMPT, TOKENS))  # so that the reference opens its files before
    assert await cancel_everywhere(start, moment, after) >= 1


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_stop_that_is_cancelled_at_any_point(
    moment: Moment, tiny: Tiny, make_engine: MakeEngine
) -> None:
    """It stops all the same, with requests, loads and an unload under way."""
    held = Held()
    engine = make_engine(tiny)
    others: list[asyncio.Task[Any]] = []

    async def ready() -> None:
        nonlocal engine
        engine = make_engine(tiny)
        await engine.start()
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        others.append(asyncio.create_task(engine.complete(PROMPT, greedy(100), adapter="x")))
        await until(lambda: engine.stats().running == 1)
        others.append(asyncio.create_task(engine.unload_adapter("x")))
        for name in ("rank-4", "regex", "rslora", "all-linear"):
            others.append(asyncio.create_task(engine.load_adapter(name, tiny.adapters[name])))
        await asyncio.sleep(0)

    async def after() -> None:
        async with asyncio.timeout(60):
            await engine.stop()
            await asyncio.wait(others)
        engine.check_invariants()
        others.clear()
        await held.check()
        await ready()

    await ready()
    assert await cancel_everywhere(lambda: engine.stop(), moment, after) >= 1
    await engine.stop()
    await asyncio.wait(others)
