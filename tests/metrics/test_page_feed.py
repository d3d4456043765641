"""The event stream: a full state, then changes; bounded for slow clients, and nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from support.page_engine import Client, FakeEngine, connected, loaded, scope

from aioengine import events
from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.metrics.asgi import SEND_SECONDS, MetricsApp, metrics_app
from aioengine.metrics.page import plumbing
from aioengine.metrics.page.feed import LOG_LENGTH

INTERVAL = 0.02
"""Seconds between two updates of one client."""


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine) -> MetricsApp:
    return metrics_app(engine, interval=INTERVAL)  # type: ignore[arg-type]


async def test_full_state_first_then_what_changed(app: MetricsApp, engine: FakeEngine) -> None:
    for index in range(5):
        engine.add(f"a{index}")
    async with connected(app) as client:
        full = await client.next()
        assert full["full"] and full["model"] == "tiny" and len(full["slots"]) == 1
        assert sorted(row[0] for row in full["adapters"]) == [f"a{i}" for i in range(5)]
        assert "secret" not in json.dumps(full)
        engine.add("a3", location="cpu", rank=4)
        engine.tell(loaded("a3", seconds=0.25))
        delta = await client.next()
        assert "full" not in delta and [row[:5] for row in delta["adapters"]] == [["a3", 1, 4, 0, "cpu"]]
        assert [(e["kind"], e["adapter"], e["seconds"]) for e in delta["log"]] == [("loaded", "a3", 0.25)]
        del engine.infos["a1"]
        engine.tell(events.AdapterUnloaded(time=2, adapter="a1", version=1))
        delta = await client.next()
        assert delta["gone"] == ["a1"] and "adapters" not in delta
        assert [e["kind"] for e in delta["log"]] == ["unloaded"]


async def test_many_events_make_one_message(app: MetricsApp, engine: FakeEngine) -> None:
    loop = asyncio.get_running_loop()
    async with connected(app) as client:
        await client.next()
        times = []
        for _ in range(5):
            for index in range(500):
                engine.steps += 1
                engine.tell(loaded(f"a{index}"))
            delta = await client.next()
            times.append(loop.time())
            assert delta["numbers"]["steps"] == engine.steps and len(delta["log"]) == 500
            assert client.sent.empty()
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert min(gaps) > INTERVAL * 0.9


async def test_slow_client_costs_nothing_and_catches_up_at_once(app: MetricsApp, engine: FakeEngine) -> None:
    async with connected(app) as slow, connected(app) as quick:
        await slow.next()
        await quick.next()
        slow.take.clear()
        engine.add("first")
        await slow.blocked.wait()
        for index in range(LOG_LENGTH + 500):
            engine.steps += 1
            engine.tell(loaded(f"a{index}"))
            if index % 500 == 0:
                while (await quick.next()).get("numbers", {}).get("steps") != engine.steps:
                    pass
        assert slow.sent.empty()
        slow.take.set()
        await slow.next()  # the one that was stuck
        update = await slow.next()
        assert len(update["log"]) == LOG_LENGTH and update["log"][-1]["adapter"] == f"a{LOG_LENGTH + 499}"
        assert update["numbers"]["steps"] == engine.steps


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_large_update_has_its_time(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The client takes that share of ``SEND_SECONDS`` for each part."""
    monkeypatch.setattr(plumbing, "PART_BYTES", 100)

    async def run() -> list[bytes]:
        leave, taken = asyncio.Event(), list[bytes]()

        async def receive() -> Any:
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                parts = 1 + len(message["body"]) // 100
                assert parts > 5
                await asyncio.sleep(share * SEND_SECONDS * parts)
                taken.append(message["body"])
                leave.set()

        app = metrics_app(engine)  # type: ignore[arg-type]
        await app(scope("/events"), receive, send)
        return taken

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        taken = runner.run(run())
    assert len(taken) == (share < 1)


async def test_unloading_without_end_is_not_remembered_for_ever(app: MetricsApp, engine: FakeEngine) -> None:
    async with connected(app) as slow:
        await slow.next()
        slow.take.clear()
        engine.add("kept")
        await slow.blocked.wait()
        async with connected(app) as quick:
            await quick.next()
            for round_ in range(3):
                for index in range(600):
                    engine.add(f"{round_}-{index}")
                while not (await quick.next()).get("adapters"):
                    pass
                for index in range(600):
                    del engine.infos[f"{round_}-{index}"]
                engine.tell(events.AdapterUnloaded(time=1, adapter=f"{round_}-0", version=1))
                while not ((update := await quick.next()).get("gone") or update.get("full")):
                    pass
        slow.take.set()
        await slow.next()
        update = await slow.next()  # too far behind: everything anew
        assert update["full"] and [row[0] for row in update["adapters"]] == ["kept"]


async def test_nothing_is_left_when_the_last_client_goes(app: MetricsApp, engine: FakeEngine) -> None:
    before = asyncio.all_tasks()
    assert not engine.listeners and not engine.asked
    async with connected(app) as one:
        await one.next()
        async with connected(app) as two:
            await two.next()
            assert len(engine.listeners) == 1 and app.watching == 2  # one listener for all
        assert len(engine.listeners) == 1 and app.watching == 1
    assert not engine.listeners and app.watching == 0 and asyncio.all_tasks() == before
    engine.tell(loaded("unheard"))
    async with connected(app) as three:
        assert "log" not in await three.next()


async def test_client_that_goes_in_the_middle_of_a_message(app: MetricsApp, engine: FakeEngine) -> None:
    before = asyncio.all_tasks()
    async with connected(app) as client:
        await client.next()
        client.take.clear()
        engine.add("a")
        await client.blocked.wait()
    assert not engine.listeners and asyncio.all_tasks() == before

    async def broken(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the connection is gone")

    await asyncio.wait_for(app(scope("/events"), Client().receive, broken), 60)
    assert not engine.listeners and asyncio.all_tasks() == before


async def test_one_address_has_half_of_the_streams(app: MetricsApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioengine.metrics.asgi.MAX_STREAMS", 4)
    tasks, statuses = [], []
    for address in ("a", "a", "a", "b", "b", "a"):
        client = Client()
        from_there = {**scope("/events"), "client": (address, 1)}
        tasks.append(asyncio.create_task(app(from_there, client.receive, client.send)))
        statuses.append((await asyncio.wait_for(client.sent.get(), 60))["status"])
    assert statuses == [200, 200, 503, 200, 503, 503]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with connected(app) as client:
        await client.next()


async def test_close_ends_the_streams(app: MetricsApp, engine: FakeEngine) -> None:
    async with connected(app) as client:
        await client.next()
        app.close()
        async with asyncio.timeout(60):
            last = await client.sent.get()
        assert last == {"type": "http.response.body", "body": b"", "more_body": False}
    late = Client()
    await app(scope("/events"), late.receive, late.send)
    assert (await late.sent.get())["status"] == 503 and not engine.listeners
