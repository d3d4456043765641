"""Answers that nobody reads: how long they are kept, and how many of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import MakeEngine, Tiny
from support.raw_http import StubApp, address_of, connected, loops
from support.server_fixtures import MODEL
from support.waiting import until

from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.metrics.page.plumbing import PART_BYTES, WATCH, watch_of
from aioengine.server import ServerSettings, create_app
from aioengine.server.access.browsers import BrowserRules
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import UNREAD, WAITS, Shares, Wait
from aioengine.server.errors import ClientDisconnected
from aioengine.server.run import ListenSettings, listening
from aioengine.server.transport.reader_watch import (
    AHEAD_BYTES,
    READ_BYTES,
    ReaderWatch,
    acknowledged_bytes,
    queued_bytes,
)
from aioengine.server.transport.sender import Sender

ASK = b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n"


class App(StubApp):
    """Answers with more than the system keeps for a client; ``/small`` with nothing."""

    def body(self, scope: Any) -> bytes:
        watch = watch_of(scope)
        assert isinstance(watch, ReaderWatch)
        watch.within(0.05)
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
        limits = ListenSettings(port=0, max_connections=1)
        async with listening(cast(Any, app), limits) as url:
            with socket.create_connection(address_of(url)) as silent:
                silent.sendall(ASK % b"large")
                await until(lambda: app.seen == 1)
                async with asyncio.timeout(60):
                    while await status(url) != b"200":
                        await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


class Clock:
    """A loop whose timers are called by hand."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], None]] = []

    def call_later(self, seconds: float, call: Callable[[], None]) -> Any:
        self.timers.append(call)
        return self

    def cancel(self) -> None:
        self.timers.clear()


class Connection:
    """A transport whose client reads when it is told to, and the socket of that transport.

    With ``tells`` the system tells what the client has acknowledged, as Linux does.
    """

    def __init__(self, *, tells: bool) -> None:
        self.tells = tells
        self.unread = self.acknowledged = 0
        self.is_aborted = False

    def get_extra_info(self, name: str) -> Any:
        return self

    def set_write_buffer_limits(self, *, high: int) -> None:
        self.high = high

    def setsockopt(self, *_: int) -> None:
        pass

    def fileno(self) -> int:
        return -1

    def getsockopt(self, level: int, name: int, size: int) -> bytes:
        return bytes(size - 8) + struct.pack("=Q", self.acknowledged * self.tells)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.is_aborted = True

    def read(self, size: int) -> int:
        size = min(size, self.unread)
        self.unread -= size
        self.acknowledged += size
        return size


SIZES = st.integers(0, 4 * READ_BYTES)


@given(st.booleans(), st.lists(st.tuples(SIZES, SIZES), max_size=30))
def test_who_reads_enough_in_each_period_is_not_cut_off(tells: bool, periods: list[tuple[int, int]]) -> None:
    """Enough are 16 KiB, or all that there were at its beginning. What was read above that before counts."""
    clock, connection = Clock(), Connection(tells=tells)
    watch = ReaderWatch(cast(Any, connection), cast(Any, clock))
    due = ahead = 0
    for written, read in periods:
        if written:
            connection.unread += written
            watch.wrote(written)
            due = due or min(READ_BYTES, written)
        read = connection.read(read)
        assert len(clock.timers) <= 1
        if clock.timers:
            clock.timers.pop()()
            ahead = min(ahead + read, AHEAD_BYTES) - due
        assert connection.is_aborted == (ahead < 0 and connection.unread > 0)
        if connection.is_aborted:
            return
        ahead, due = max(ahead, 0), min(READ_BYTES, connection.unread)
        assert bool(clock.timers) == bool(connection.unread)
    watch.close()
    assert not clock.timers


class RealConnection:
    """A transport that passes on to a socket what its system takes."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self.socket = connection
        self.unsent = size
        self.is_aborted = False

    def get_extra_info(self, name: str) -> Any:
        return self.socket

    def set_write_buffer_limits(self, *, high: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent -= self.socket.send(bytes(min(self.unsent, 1 << 16)))

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a client has acknowledged")
def test_the_system_takes_no_lumps() -> None:
    """A client that reads 32 KiB in each period is not cut off, and one that stops is."""
    with contextlib.ExitStack() as sockets:
        listens = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = sockets.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.settimeout(60)
        client.connect(listens.getsockname())
        server = sockets.enter_context(listens.accept()[0])
        server.setblocking(False)
        clock, connection = Clock(), RealConnection(server, 64 << 20)
        watch = ReaderWatch(cast(Any, connection), cast(Any, clock))
        connection.send()
        assert (64 << 20) - connection.unsent < 1 << 20, "the system has not taken megabytes ahead"
        watch.wrote(64 << 20)
        for _ in range(200):
            client.recv(1 << 15, socket.MSG_WAITALL)
            connection.send()
            clock.timers.pop()()
            assert not connection.is_aborted
        assert queued_bytes(server) > 0 and acknowledged_bytes(server) > 100 << 15
        for _ in range(10 * AHEAD_BYTES // READ_BYTES):
            if clock.timers:
                clock.timers.pop()()
        assert connection.is_aborted


def test_the_application_says_how_long_a_period_is() -> None:
    periods: list[float] = []

    class Loop(Clock):
        def call_later(self, seconds: float, call: Callable[[], None]) -> Any:
            periods.append(seconds)
            return super().call_later(seconds, call)

    clock, connection = Loop(), Connection(tells=True)
    watch = ReaderWatch(cast(Any, connection), cast(Any, clock))
    for seconds in (5.0, 90.0):
        watch.within(seconds)
        connection.unread += 1
        watch.wrote(1)
        connection.read(1)
        clock.timers.pop()()
    assert periods == [5.0, 90.0]


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("seconds", [3.0, 5.0])
def test_each_part_of_a_large_answer_has_its_own_time(seconds: float, is_watched: bool) -> None:
    """The client takes ``seconds`` for each of 8 parts, and may take 4 where the server does not watch it."""

    async def run() -> bytes:
        taken: list[bytes] = []

        async def send(message: Any) -> None:
            await asyncio.sleep(seconds)
            taken.append(message.get("body", b""))

        record = RequestRecord(request_id="a", method="POST", path="/v1/completions")
        scope: dict[str, Any] = {"extensions": {WATCH: object()}} if is_watched else {}
        scope |= {"headers": [], "method": "POST"}
        sender = Sender(send, scope, record, Shares(UNREAD), BrowserRules((), ()), lambda _: 1, seconds=4.0)
        with contextlib.suppress(ClientDisconnected):
            await sender({"type": "http.response.start", "status": 200, "headers": []})
            await sender({"type": "http.response.body", "body": bytes(8 * PART_BYTES)})
        return b"".join(taken)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        body = runner.run(run())
    assert body == (bytes(8 * PART_BYTES) if is_watched or seconds < 4 else b"")


async def test_what_a_client_leaves_unread_is_bounded(
    tiny_text: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_engine(tiny_text) as engine:
        app = create_app(engine, ServerSettings(served_model_names=[MODEL]))
        reads = asyncio.Event()
        limits: list[float] = []

        async def ask(client: str, seen: list[Any]) -> None:
            async def receive() -> Any:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Any) -> None:
                seen.append(message)
                if len(message.get("body", b"")) == PART_BYTES:
                    await reads.wait()

            scope = {"type": "http", "method": "GET", "path": "/docs/openapi.json", "headers": []}
            scope |= {"query_string": b"", "client": (client, 1), "http_version": "1.1", "scheme": "http"}
            scope["extensions"] = {WATCH: SimpleNamespace(within=limits.append)}
            await app(scope, receive, send)

        whole: list[Any] = []
        reads.set()
        await ask("10.0.0.1", whole)
        bodies = [message["body"] for message in whole if message["type"] == "http.response.body"]
        assert len(bodies) > 1 and max(map(len, bodies)) == PART_BYTES, "it is sent in parts"
        size = sum(map(len, bodies))
        app.unread.most = size * 5 // 2
        reads.clear()
        first: list[Any] = []
        pending = asyncio.create_task(ask("10.0.0.1", first))
        await until(lambda: len(first) > 1)
        second: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setitem(WAITS, "room for a large answer", Wait(0.0, "503"))
            await ask("10.0.0.1", second)
        assert second[0]["status"] == 503 and b"wait to be read" in second[1]["body"]
        later: list[Any] = []
        waits = asyncio.create_task(ask("10.0.0.1", later))  # for room, with its answer made
        other: list[Any] = []
        answered = asyncio.create_task(ask("10.0.0.2", other))
        await until(lambda: len(other) > 1)
        assert other[0]["status"] == 200
        assert not later
        reads.set()
        await asyncio.gather(pending, answered, waits)
        assert later[0]["status"] == 200
        app.change(ServerSettings(served_model_names=[MODEL], send_timeout=7.0))
        third: list[Any] = []
        await ask("10.0.0.1", third)
        assert third[0]["status"] == 200
        assert set(limits[:-1]) == {60.0} and limits[-1] == 7.0
        assert b"".join(message.get("body", b"") for message in third) == b"".join(bodies)
