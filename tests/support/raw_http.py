"""Connections to a server without a client library, and an application that answers with nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.partition("://")[2].rpartition(":")
    return host, int(port)


async def connected(url: str, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A new connection, through which ``data`` is sent."""
    reader, writer = await asyncio.open_connection(*address_of(url))
    writer.write(data)
    return reader, writer


async def answered(url: str, data: bytes) -> bytes:
    """All that is answered to ``data``, until the server closes the connection."""
    reader, writer = await connected(url, data)
    found = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return found


class StubApp:
    """Counts the requests that reach it, and answers with an empty body."""

    active = 0

    def __init__(self) -> None:
        self.seen = 0

    def close(self) -> None:
        pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen += 1
        body = self.body(scope)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def body(self, scope: Any) -> bytes:
        return b""


def loops() -> list[Callable[[], asyncio.AbstractEventLoop]]:
    """Every event loop that there is here."""
    if sys.platform == "win32":
        return [asyncio.new_event_loop]
    import uvloop

    return [asyncio.new_event_loop, uvloop.new_event_loop]
