"""What an application that embeds the engine relies on: cancellation, cleanliness, a loop that runs."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from support.engine_fixtures import MakeEngine, Tiny, greedy, register
from support.failure_harness import Held

from aioengine import SamplingParams
from aioengine.errors import EngineStopped


async def test_two_engines_in_one_process(tiny_of: Callable[[str], Tiny], make_engine: MakeEngine) -> None:
    one, two = tiny_of("llama"), tiny_of("qwen3")
    async with make_engine(one) as a, make_engine(two, max_loras=1) as b:
        for engine, tiny in ((a, one), (b, two)):
            engine.register_adapter("x", tiny.adapters["rank-3"])
        results = await asyncio.gather(
            *(e.complete([7, 7, i], greedy(), adapter="x") for i in range(4) for e in (a, b))
        )
        assert a.metrics.registry is not b.metrics.registry
    for i, out in enumerate(results):
        tiny = (one, two)[i % 2]
        assert out.token_ids == tiny.expected([7, 7, i // 2], 24, "rank-3")


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_runs_on_any_loop_and_leaves_nothing(
    loop_factory: Callable[[], Any], tiny: Tiny, make_engine: MakeEngine
) -> None:
    async def main() -> None:
        held = Held()
        async with make_engine(tiny) as engine:
            engine.register_adapter("x", tiny.adapters["rank-3"])
            out = await engine.complete([7, 7], greedy(), adapter="x")
            assert out.token_ids == tiny.expected([7, 7], 24, "rank-3")
            left_running = asyncio.create_task(engine.complete([1], greedy(100)))
            await asyncio.sleep(0)
        with pytest.raises(EngineStopped):
            await left_running
        await held.check()

    list(tiny.expected([7, 7], 1, "rank-3"))  # so that the reference opens its files before
    for _ in range(2):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main())


async def test_a_stopped_engine_holds_no_memory(tiny: Tiny, make_engine: MakeEngine) -> None:
    """Even before Python looks for reference cycles, which it may do much later."""
    async with make_engine(tiny) as engine:
        await engine.load_adapter("a", tiny.adapters["rank-4"])
        await engine.complete([5, 6, 7], greedy(2), adapter="a")
        built = engine._built
        runner, store = built.device.runner, built.device.store
        held = [weakref.ref(runner.model), weakref.ref(next(iter(store.images.values())).data)]
        assert all(ref() is not None for ref in held)
        del built, runner, store
        gc.collect()
        gc.disable()
    try:
        assert [ref() for ref in held] == [None, None]
        assert engine.stats().waiting == 0  # the engine itself is still there to be asked
    finally:
        gc.enable()


async def test_before_start_and_after_stop(tiny: Tiny, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    for call in (engine.stats, engine.adapters, lambda: engine.register_adapter("a", "/x")):
        with pytest.raises(EngineStopped):
            call()
    with pytest.raises(EngineStopped):
        await engine.complete([1])
    async with engine:
        pass
    with pytest.raises(EngineStopped):
        await engine.complete([1])
    await engine.stop()


async def test_stops_and_logprobs(tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text) as engine:
        full = await engine.complete("stop here", SamplingParams(max_tokens=40, logprobs=2, ignore_eos=True))
        assert full.logprobs is not None
        assert len(full.logprobs) == len(full.token_ids) == 40
        for token, logprob in zip(full.token_ids, full.logprobs, strict=True):
            assert logprob.token_id == token
            assert logprob.top[0] == (token, logprob.logprob), "greedy takes the likeliest"
            assert len(logprob.top) == 2
        token = full.token_ids[5]
        first = full.token_ids.index(token)
        by_token = await engine.complete(
            "stop here", SamplingParams(max_tokens=40, stop_token_ids=[token], ignore_eos=True)
        )
        assert by_token.token_ids == full.token_ids[: first + 1]
        assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
        stop = full.text[6:9]  # three characters: spans tokens
        by_text = await engine.complete(
            "stop here", SamplingParams(max_tokens=40, stop=stop, ignore_eos=True)
        )
        assert by_text.text == full.text[: full.text.index(stop)]
        assert (by_text.finish_reason, by_text.stop_reason) == ("stop", stop)


@pytest.mark.timed
async def test_the_loop_stays_free_while_the_engine_generates(tiny: Tiny, make_engine: MakeEngine) -> None:
    """A 10 ms ticker, beside a batch that is busy all the time and swaps adapters."""
    late: list[float] = []
    loop = asyncio.get_running_loop()

    async def tick() -> None:
        while True:
            due = loop.time() + 0.01
            await asyncio.sleep(0.01)
            late.append(loop.time() - due)

    async with make_engine(tiny) as engine:
        register(engine, tiny)
        ticker = asyncio.create_task(tick())
        names = [None, *tiny.adapters]
        await asyncio.gather(
            *(engine.complete([3, i], greedy(100), adapter=names[i % len(names)]) for i in range(40))
        )
        ticker.cancel()
    late.sort()
    p99 = late[int(len(late) * 0.99)]
    print(f"ticker: {len(late)} ticks, p99 {p99 * 1e3:.1f} ms late, worst {late[-1] * 1e3:.1f} ms")
    assert len(late) > 20
    assert p99 < 0.05
