"""Parts that all ASGI applications here share: types, mount paths, answers, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

PART_BYTES = 64 * 1024
"""Largest part of an answer. The next one is sent when the client has taken most of those before."""
DEPARTURE = "aioengine.departure"
"""ASGI extension of servers that say at once when a client has gone: its value is a future, which is done
then. It costs less than a task that waits for ASGI's message of it."""


def departure_of(scope: Scope) -> asyncio.Future[None] | None:
    """Return the future that is done once this client has gone, if its server has that."""
    departure: asyncio.Future[None] | None = (scope.get("extensions") or {}).get(DEPARTURE)
    return departure


def in_parts(message: Message) -> Iterator[Message]:
    """Split the message of a body into messages of ``PART_BYTES`` at most."""
    body: bytes = message.get("body", b"")
    if len(body) <= PART_BYTES:
        yield message
        return
    has_more = message.get("more_body", False)
    for begin in range(0, len(body), PART_BYTES):
        end = begin + PART_BYTES
        yield {**message, "body": body[begin:end], "more_body": has_more or end < len(body)}


def below_mount(scope: Scope) -> tuple[str, str]:
    """Return the path below the mount point, and the mount point, "" if there is none.

    Some frameworks leave the mount point in the path, some do not.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return path, root


async def answer_no_http(scope: Scope, receive: Receive, send: Send, close: Callable[[], None]) -> None:
    """Answer the other protocols of ASGI: lifespan, whose end calls ``close``, and WebSockets, which are
    refused."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000})
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            close()
            return


async def respond(send: Send, status: int, headers: Headers, body: bytes, *, head: bool = False) -> None:
    """Send an answer in one piece; for HEAD only its headers."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": b"" if head else body})


async def disconnected(receive: Receive) -> None:
    """Wait until the client is gone. ``receive`` is ASGI's, after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
