"""Answers that nobody reads: how long they are kept, and how many of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.raw_http import StubApp, address_of, connected, loops
from support.server_fixtures import MODEL
from support.waiting import until

from aioengine.metrics.page.plumbing import PART_BYTES
from aioengine.server import ServerSettings, create_app
from aioengine.server.run import ListenSettings, listening

ASK = b"GET /%s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


class App(StubApp):
    """Answers with more than the system keeps for a client; ``/small`` with less than is kept here."""

    def body(self, scope: Any) -> bytes:
        return b"" if scope["path"] == "/small" else bytes(64 << 20)


@pytest.mark.parametrize("loop", loops())
@pytest.mark.slow
def test_a_client_that_reads_nothing_is_cut_off(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Its connection is the only one that there may be, so others are answered once it is gone."""

    async def status(url: str) -> bytes:
        try:
            reader, writer = await connected(url, ASK % b"small")
            head = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            return head[9:12]
        except (OSError, asyncio.IncompleteReadError):
            return b""

    async def run() -> None:
        app = App()
        limits = ListenSettings(port=0, max_connections=1, send_timeout=0.05)
        async with listening(cast(Any, app), limits) as url:
            with socket.create_connection(address_of(url)) as silent:
                silent.sendall(ASK % b"large")
                await until(lambda: app.seen == 1)
                async with asyncio.timeout(60):
                    while await status(url) != b"200":
                        await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("loop", loops())
@pytest.mark.slow
def test_a_client_that_reads_slowly_gets_all(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def run() -> None:
        async with listening(cast(Any, App()), ListenSettings(port=0, send_timeout=2.0)) as url:
            reader, writer = await asyncio.open_connection(*address_of(url), limit=1 << 16)
            writer.write(ASK % b"large")
            size = 0
            while part := await reader.read(1 << 20):
                size += len(part)
                if size < 4 << 20:
                    await asyncio.sleep(0.05)
            assert size > 64 << 20
            writer.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


async def test_what_a_client_leaves_unread_is_bounded(tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text) as engine:
        app = create_app(engine, ServerSettings(served_model_names=[MODEL]))
        for index in range(1000):
            engine.register_adapter(f"adapter-{index}", tiny_text.adapters["a"])
        reads = asyncio.Event()

        async def ask(client: str, seen: list[Any]) -> None:
            async def receive() -> Any:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Any) -> None:
                seen.append(message)
                if len(message.get("body", b"")) == PART_BYTES:
                    await reads.wait()

            scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
            scope |= {"query_string": b"", "client": (client, 1), "http_version": "1.1", "scheme": "http"}
            await app(scope, receive, send)

        whole: list[Any] = []
        reads.set()
        await ask("10.0.0.1", whole)
        bodies = [message["body"] for message in whole if message["type"] == "http.response.body"]
        assert len(bodies) > 1 and max(map(len, bodies)) == PART_BYTES, "it is sent in parts"
        app.unread.most = sum(map(len, bodies)) * 5 // 2
        reads.clear()
        first: list[Any] = []
        second: list[Any] = []
        other: list[Any] = []
        pending = asyncio.create_task(ask("10.0.0.1", first))
        await until(lambda: len(first) > 1)
        await ask("10.0.0.1", second)
        assert second[0]["status"] == 503 and b"wait to be read" in second[1]["body"]
        answered = asyncio.create_task(ask("10.0.0.2", other))
        await until(lambda: len(other) > 1)
        assert other[0]["status"] == 200
        reads.set()
        await asyncio.gather(pending, answered)
        last: list[Any] = []
        await ask("10.0.0.1", last)
        assert b"".join(message.get("body", b"") for message in last) == b"".join(bodies)
