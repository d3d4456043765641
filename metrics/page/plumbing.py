"""Parts that all ASGI applications here share: types, mount paths, answers, and clients that leave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]


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
