"""Scripted engines and hand-driven clients, for tests of the metrics application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder
from support import metric_script
from support.adapter_infos import adapter_info

from aioengine import AsyncEngine, EngineConfig, events
from aioengine.info import AdapterInfo, EngineStats
from aioengine.metrics.asgi import MetricsApp, metrics_app
from aioengine.metrics.page.feed import WatchedEngine


class FakeMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Gauge("one", "Always 1.", registry=self.registry).set(1)
        Gauge("two", "Always 2.", registry=self.registry).set(2)

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class FakeEngine:
    """An engine that says what the test tells it to, and counts who asks."""

    def __init__(self) -> None:
        self.config = EngineConfig(model="/models/tiny")
        self.metrics = FakeMetrics()
        self.listeners: list[Callable[[events.Event], None]] = []
        self.infos: dict[str, AdapterInfo] = {}
        self.steps = 0
        self.asked = 0

    def stats(self) -> EngineStats:
        self.asked += 1
        return metric_script.stats(metric_script.slot(0, "FREE"), steps=self.steps)

    def adapters(self) -> list[AdapterInfo]:
        return list(self.infos.values())

    def add_listener(self, listener: Callable[[events.Event], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def tell(self, event: events.Event) -> None:
        for listener in list(self.listeners):
            listener(event)

    def add(self, name: str, location: Any = "disk", rank: int = 0) -> None:
        self.infos[name] = adapter_info(name, path=f"/secret/{name}", rank=rank, bytes=0, location=location)
        self.tell(metric_script.registered(name))


loaded = metric_script.short(events.AdapterLoaded, "adapter", time=1.0, rank=4, nbytes=10, seconds=0.5)


class Told:
    """An engine as the page sees it, with some of what it says put differently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.config = engine.config
        self.metrics = engine.metrics
        self.change_adapters: Callable[[list[AdapterInfo]], list[AdapterInfo]] = lambda infos: infos
        self.change_stats: Callable[[EngineStats], EngineStats] = lambda stats: stats

    def stats(self) -> EngineStats:
        return self.change_stats(self._engine.stats())

    def adapters(self) -> list[AdapterInfo]:
        return self.change_adapters(self._engine.adapters())

    def add_listener(self, listener: Callable[[events.Event], None]) -> Callable[[], None]:
        return self._engine.add_listener(listener)


class Client:
    """One open event stream, whose server side the test drives."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.leave = asyncio.Event()
        self.take = asyncio.Event()
        """Cleared: the connection takes nothing."""
        self.take.set()
        self.blocked = asyncio.Event()

    async def receive(self) -> Any:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.take.is_set():
            self.blocked.set()
        await self.take.wait()
        self.sent.put_nowait(message)

    async def next(self) -> dict[str, Any]:
        """The next update."""
        async with asyncio.timeout(60):
            message = await self.sent.get()
        body = message["body"]
        assert body.startswith(b"data: ") and body.endswith(b"\n\n") and body.count(b"\n") == 2
        return json.loads(body[6:])


def scope(path: str, method: str = "GET", **fields: Any) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", **fields}


@asynccontextmanager
async def connected(app: MetricsApp) -> AsyncIterator[Client]:
    client = Client()
    task = asyncio.create_task(app(scope("/events"), client.receive, client.send))
    try:
        start = await asyncio.wait_for(client.sent.get(), 60)
        kind = dict(start["headers"])[b"content-type"]
        assert start["status"] == 200 and kind == b"text/event-stream; charset=utf-8"
        yield client
    finally:
        client.leave.set()
        await asyncio.wait_for(task, 60)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(app: Any, close: Callable[[], None] = lambda: None, port: int = 0) -> AsyncIterator[str]:
    """Serve an ASGI application by uvicorn, and yield its URL; ``close`` ends its streams."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = _Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            close()
            server.should_exit = True
            await task


def serve_page(engine: WatchedEngine, port: int = 0) -> AbstractAsyncContextManager[str]:
    """Serve the page of an engine."""
    app = metrics_app(engine)
    return served(app, app.close, port)
