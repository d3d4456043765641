"""Answers that nobody reads: how long they are kept, and how many of them."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL
from support.waiting import until

from aioengine.server import ServerSettings, create_app
from aioengine.server.errors import ApiError
from aioengine.server.run import ListenSettings, listening
from aioengine.server.transport import answers
from aioengine.server.transport.answers import PART_BYTES, UnreadAnswers
from aioengine.server.transport.reader_watch import READ_BYTES, ReaderWatch

ASK = b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n"


class App:
    """Answers with more than the system keeps for a client; ``/small`` with nothing."""

    active = 0

    def __init__(self) -> None:
        self.seen = 0

    def close(self) -> None:
        pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen += 1
        body = b"" if scope["path"] == "/small" else bytes(64 << 20)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def loops() -> list[Callable[[], asyncio.AbstractEventLoop]]:
    if sys.platform == "win32":
        return [asyncio.new_event_loop]
    import uvloop

    return [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.mark.parametrize("loop", loops())
def test_a_client_that_reads_nothing_is_cut_off(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Its connection is the only one that there may be, so others are answered once it is gone."""

    async def status(address: Any) -> bytes:
        try:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(ASK % b"small")
            head = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            return head[9:12]
        except (OSError, asyncio.IncompleteReadError):
            return b""

    async def run() -> None:
        app = App()
        limits = ListenSettings(port=0, max_connections=1, send_timeout=0.05)
        async with listening(cast(Any, app), limits) as url:
            parts = urlsplit(url)
            address = parts.hostname, parts.port
            with socket.create_connection(address) as silent:
                silent.sendall(ASK % b"large")
                await until(lambda: app.seen == 1)
                async with asyncio.timeout(60):
                    while await status(address) != b"200":
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
    def __init__(self) -> None:
        self.unread = 0
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.is_aborted = True


@given(st.lists(st.tuples(st.integers(0, 4 * READ_BYTES), st.integers(0, 4 * READ_BYTES)), max_size=20))
def test_who_reads_enough_in_each_period_is_not_cut_off(periods: list[tuple[int, int]]) -> None:
    clock, connection = Clock(), Connection()
    watch = ReaderWatch(cast(Any, connection), 60.0, cast(Any, clock))
    for written, read in periods:
        before = connection.unread
        if written:
            connection.unread += written
            watch.wrote(written)
        read = min(read, connection.unread)
        connection.unread -= read
        assert len(clock.timers) <= 1
        if clock.timers:
            clock.timers.pop()()
        is_slow = bool(connection.unread) and read < READ_BYTES
        assert connection.is_aborted == is_slow, (before, written, read)
        if connection.is_aborted:
            return
        assert bool(clock.timers) == bool(connection.unread)
    watch.close()
    assert not clock.timers


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 200), st.booleans()), max_size=40))
def test_one_client_has_half_of_what_others_leave(asked: list[tuple[str, int, bool]]) -> None:
    unread = UnreadAnswers()
    held: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "UNREAD_BYTES", 1000)
        for owner, size, ends in asked:
            if ends and held:
                unread.release(*held.pop(0))
                continue
            of: Counter[str] = Counter()
            for other, own in held:
                of[other] += own
            left = 1000 - (of.total() - of[owner])
            fits = not of[owner] or of[owner] + size <= left // 2
            if fits:
                unread.hold(owner, size)
                held.append((owner, size))
            else:
                with pytest.raises(ApiError) as refused:
                    unread.hold(owner, size)
                assert refused.value.status == 503


async def test_what_a_client_leaves_unread_is_bounded(
    tiny_text: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_engine(tiny_text) as engine:
        app = create_app(engine, ServerSettings(served_model_names=[MODEL]))
        reads = asyncio.Event()

        async def ask(client: str, seen: list[Any]) -> None:
            async def receive() -> Any:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Any) -> None:
                seen.append(message)
                if len(message.get("body", b"")) == PART_BYTES:
                    await reads.wait()

            scope = {"type": "http", "method": "GET", "path": "/docs/openapi.json", "headers": []}
            scope |= {"query_string": b"", "client": (client, 1), "http_version": "1.1", "scheme": "http"}
            await app(scope, receive, send)

        whole: list[Any] = []
        reads.set()
        await ask("10.0.0.1", whole)
        bodies = [message["body"] for message in whole if message["type"] == "http.response.body"]
        assert len(bodies) > 1 and max(map(len, bodies)) == PART_BYTES, "it is sent in parts"
        size = sum(map(len, bodies))
        monkeypatch.setattr(answers, "UNREAD_BYTES", size * 5 // 2)
        reads.clear()
        first: list[Any] = []
        pending = asyncio.create_task(ask("10.0.0.1", first))
        await until(lambda: len(first) > 1)
        second: list[Any] = []
        await ask("10.0.0.1", second)
        assert second[0]["status"] == 503 and b"wait to be read" in second[1]["body"]
        other: list[Any] = []
        answered = asyncio.create_task(ask("10.0.0.2", other))
        await until(lambda: len(other) > 1)
        assert other[0]["status"] == 200
        reads.set()
        await asyncio.gather(pending, answered)
        third: list[Any] = []
        await ask("10.0.0.1", third)
        assert third[0]["status"] == 200
        assert b"".join(message.get("body", b"") for message in third) == b"".join(bodies)
