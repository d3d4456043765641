"""``aioengine top`` beside servers that are restarted, stand still, or are no servers of this program."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from support import preloaded
from support.waiting import until

from aioengine.cli.process import EXIT_INTERRUPTED
from aioengine.cli.top import frame, look
from aioengine.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def seen(
    uptime: float = 1.0, slots: int = 2, requests: int = 0, finished: int = 0, began: float = 0.0
) -> dict[str, Any]:
    """What ``/debug/requests`` answers."""
    slot = {"state": "READY", "adapter": "a-rather-long-name-of-an-adapter", "version": 1, "pinned": True}
    request = {"request_id": "r" * 36, "route": "/v1/completions", "tenant": "t" * 30, "adapter": "a"}
    counted = {"requests_finished": finished, "output_tokens": 10 * finished, "slot_loads": 0}
    stats = {
        "running": 16,
        "max_running": 64,
        "waiting": 1000,
        "max_waiting": 1024,
        "waiting_for_adapter": 900,
        "waiting_preempted": 12,
        "kv_blocks": 4096,
        "kv_blocks_free": 1,
        "adapters": 2000,
        "cpu_adapters": 64,
        "cpu_capacity": 64,
        **counted,
        "slots": [{**slot, "index": i, "running": i} for i in range(slots)],
    }
    return {
        "model": "tiny",
        "state": "running",
        "uptime": uptime,
        "time": began + uptime,
        "step_age": 0.25,
        "stats": stats,
        "requests": [{**request, "seconds": 9.0}] * requests,
    }


def drawn(now: dict[str, Any], before: dict[str, Any] | None, width: int, height: int | None = None) -> str:
    picture = io.StringIO()
    Console(file=picture, width=width).print(frame(now, before, height))
    return picture.getvalue()


def answer(body: object, status: str = "200 OK") -> bytes:
    text = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text


class Canned:
    """A server that sends ``reply`` to every request; None: nothing, and the connection stays open."""

    def __init__(self, reply: bytes | None) -> None:
        self.reply = reply
        self.url = ""
        self.asked = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            if self.reply is None:
                await reader.read()
            else:
                writer.write(self.reply)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def canned(reply: bytes | None) -> AsyncIterator[Canned]:
    made = Canned(reply)
    async with await asyncio.start_server(made.answer, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"", "no aioengine server answers there"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no aioengine server answers there: SSH-2.0"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{}", "no aioengine server answers there"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "no aioengine server answers there"),
        (answer({}), "of this version"),
        (answer([1]), "of this version"),
        (answer({}, "404 Not Found"), "no aioengine server answers there: HTTP Error 404"),
        (answer({"error": {"message": "still starting"}}, "503 Service Unavailable"), ": still starting"),
        (answer([], "503 Service Unavailable"), "HTTP Error 503"),
        (answer({}, "403 Forbidden"), "scope admin"),
    ],
)
async def test_whatever_answers_there_is_named(reply: bytes, says: str) -> None:
    async with canned(reply) as server:
        with pytest.raises(ConfigError) as caught:
            await asyncio.to_thread(look, server.url, None)
    assert str(caught.value).startswith(f"{server.url}: ") and says in str(caught.value)


@pytest.mark.slow
async def test_what_is_not_of_this_version_is_named() -> None:
    """Whatever part is missing or of another kind: what :func:`look` returns can be drawn."""
    whole = seen(requests=1)

    def changed(part: Any) -> Iterator[Any]:
        """``part`` with one of its values taken out, or replaced."""
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            value = part[key]
            for other in (None, [], {}, "x", -1, *(changed(value) if isinstance(value, dict | list) else ())):
                copy = part.copy()
                copy[key] = other
                yield copy
            if isinstance(part, dict):
                yield {name: part[name] for name in part if name != key}

    refused: list[str] = []
    async with canned(None) as server:
        for one in changed(whole):
            server.reply = answer(one)
            try:
                found = await asyncio.to_thread(look, server.url, None)
            except ConfigError as error:
                refused.append(str(error))
            else:
                drawn(found, found, 120, 24)
                drawn(found, None, 80)
    assert len(refused) > 50 and all("of this version" in text for text in refused)


@given(height=st.integers(15, 80), slots=st.integers(0, 200), requests=st.integers(0, 200))
@pytest.mark.slow
def test_both_tables_have_room_on_every_screen(height: int, slots: int, requests: int) -> None:
    lines = drawn(seen(slots=slots, requests=requests), None, 80, height).splitlines()
    assert len(lines) <= height
    assert sum("rrr" in line for line in lines) >= min(requests, 1)
    assert sum("ready" in line for line in lines) >= min(slots, 1)
    if slots and not any("more" in line for line in lines):
        assert sum("ready" in line for line in lines) == slots


@given(width=st.integers(20, 200))
@example(width=100)
def test_a_narrow_terminal_still_shows_the_numbers(width: int) -> None:
    text = drawn(seen(slots=3, requests=2), None, width, 24)
    if width >= 60:
        assert any(line.startswith("9.0 ") and "rrr" in line for line in text.splitlines())
        assert all(head in text for head in ("seconds", "request", "tenant", "adapter", "prompt", "output"))
    assert all(len(line) <= width for line in text.splitlines())
    assert "running 16 of 64" in text.replace("\n", " ")


def test_rates_are_of_one_process_by_its_own_clock() -> None:
    first, later = seen(10.0, finished=5), seen(12.0, finished=25)
    assert "10.0 requests/s   100.0 tokens/s" in drawn(later, first, 120)
    for uptime in (1.0, 20.0):  # it may be up for longer than the one before was
        for finished in (0, 100):
            restarted = seen(uptime, finished=finished, began=60.0)
            assert "/s" not in drawn(restarted, later, 120)


@contextlib.asynccontextmanager
async def on_a_terminal(*arguments: str) -> AsyncIterator[tuple[preloaded.Program, bytearray]]:
    """``aioengine ARGUMENTS`` on a terminal of 24 lines, and what it has written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm"}
    program = preloaded.start("aioengine", *arguments, environment=environment, errors=theirs, output=theirs)
    os.close(theirs)
    os.set_blocking(ours, False)
    loop, written = asyncio.get_running_loop(), bytearray()

    def read() -> None:
        try:
            written.extend(os.read(ours, 2**16))
        except OSError:  # the program has ended
            loop.remove_reader(ours)

    loop.add_reader(ours, read)
    try:
        yield program, written
    finally:
        loop.remove_reader(ours)
        if program.returncode is None:
            program.kill()
            await program.wait()
        os.close(ours)


async def test_it_stays_while_a_server_is_away_and_ends_at_once() -> None:
    async with (
        canned(answer(seen())) as server,
        on_a_terminal("top", "--url", server.url, "--every", "0.01") as (program, written),
    ):
        await until(lambda: b"running 16 of 64" in written)
        server.reply = b""
        await until(lambda: b"no aioengine server answers there" in written)
        server.reply = answer(seen() | {"model": "another"})
        await until(lambda: b"another" in written)
        server.reply, asked = None, server.asked
        await until(lambda: server.asked > asked)  # it waits for an answer
        program.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(program.wait(), 60) == EXIT_INTERRUPTED
        await until(lambda: b"interrupted" in written)
    assert written.count(b"\x1b[?1049h") == written.count(b"\x1b[?1049l") == 1, "the terminal's own screen"


async def test_pipes_get_one_picture_after_another() -> None:
    async with canned(answer(seen())) as server:
        outlet, inlet = os.pipe()
        arguments = ("top", "--url", server.url, "--every", "0.01")
        program = preloaded.start(
            "aioengine", *arguments, environment=dict(os.environ), errors=inlet, output=inlet
        )
        os.close(inlet)
        pipe = os.fdopen(outlet, "rb")
        for _ in range(3):
            while b"running 16 of 64" not in await asyncio.to_thread(pipe.readline):
                pass
        pipe.close()
        assert await asyncio.wait_for(program.wait(), 60) != 0  # nobody reads it any more
