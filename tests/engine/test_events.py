"""The event stream: what a reader gets, when it ends, and what a slow reader costs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy

from aioengine.errors import AdapterLoadError, ConfigError
from aioengine.events import (
    AdapterEvent,
    AdapterEvicted,
    AdapterFailed,
    AdapterLoaded,
    AdapterLoading,
    AdapterPlaced,
    AdapterPlacing,
    AdapterRegistered,
    AdapterUnloaded,
    Event,
    FirstToken,
    RequestEnded,
)


async def test_the_life_of_an_adapter(tiny: Tiny, make_engine: MakeEngine) -> None:
    """Each move with its time and its size, in order."""
    found: list[Any] = []
    async with make_engine(tiny) as engine:
        engine.add_listener(found.append, AdapterEvent)
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        await engine.complete([4, 5], greedy(2), adapter="x")
        nbytes = engine.adapters()[0].bytes
        with pytest.raises(AdapterLoadError):
            await engine.load_adapter("bad", tiny.model.parent / "nowhere")
        await engine.unload_adapter("x")
    assert [type(e) for e in found if e.adapter == "x"] == [
        AdapterLoading,
        AdapterLoaded,
        AdapterRegistered,
        AdapterPlacing,
        AdapterPlaced,
        AdapterEvicted,
        AdapterEvicted,
        AdapterUnloaded,
    ]
    assert [e.time for e in found] == sorted(e.time for e in found)
    sizes = {e.nbytes for e in found if isinstance(e, (AdapterLoaded, AdapterPlaced, AdapterEvicted))}
    assert sizes == {nbytes}
    assert all(e.seconds > 0 for e in found if isinstance(e, (AdapterLoaded, AdapterPlaced)))
    (failed,) = (e for e in found if isinstance(e, AdapterFailed))
    assert (failed.adapter, failed.reason) == ("bad", "io")


async def test_a_refused_listener_leaves_nothing_behind(tiny: Tiny, make_engine: MakeEngine) -> None:
    heard: list[Event] = []
    async with make_engine(tiny) as engine:
        for kind in ([FirstToken], "FirstToken", None, int):
            with pytest.raises(ConfigError, match=r"must be a class of aioengine\.events"):
                engine.add_listener(heard.append, RequestEnded, kind)  # type: ignore[arg-type]
        assert len((await engine.complete([4, 5], greedy(2))).token_ids) == 2
    assert heard == []


async def test_each_registration_of_a_listener_ends_alone(tiny: Tiny, make_engine: MakeEngine) -> None:
    heard: list[Event] = []
    async with make_engine(tiny) as engine:
        ends = [engine.add_listener(heard.append, kind) for kind in (FirstToken, RequestEnded, RequestEnded)]
        for end, left in zip(ends, ([RequestEnded] * 2, [RequestEnded], []), strict=True):
            end()
            end()  # does nothing
            await engine.complete([4, 5], greedy(2))
            assert [type(e) for e in heard] == left
            heard.clear()


async def test_stats_after_the_stop_are_the_last(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        await engine.complete([4, 5], greedy(2))
        last = engine.stats()
    assert engine.stats() == last
    assert last.requests_finished == 1


@pytest.mark.parametrize(
    "raised", [ValueError, StopIteration, asyncio.CancelledError, GeneratorExit, SystemExit, BaseException]
)
async def test_whatever_a_listener_raises_the_engine_goes_on(
    raised: type[BaseException], tiny: Tiny, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(event: Event) -> None:
        raise raised("of a listener")

    async with make_engine(tiny) as engine:
        heard: list[Event] = []
        engine.add_listener(fails)
        engine.add_listener(heard.append)
        out = await asyncio.wait_for(engine.complete([4, 5], greedy(4)), 30)
        assert len(out.token_ids) == 4 and engine.state == "running"
        assert engine.stats().listener_failures >= len(heard) > 4
        text = engine.metrics.expose()[0].decode()
    assert "aioengine_listener_failures_total" in text
    assert len([record for record in caplog.records if "listener" in record.message]) == 1
