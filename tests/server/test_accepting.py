"""Connections are accepted as they come, on uvloop too."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from aioengine.server.run import ListenSettings, listening


class App:
    """Counts the requests that reach it."""

    active = 0

    def __init__(self) -> None:
        self.seen = 0

    def close(self) -> None:
        pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen += 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop is not for Windows")
def test_many_that_connect_at_once_are_accepted_in_few_passes() -> None:
    import uvloop

    async def passes() -> int:
        app = App()
        async with listening(cast(Any, app), ListenSettings(port=0)) as url:
            address = urlsplit(url)
            clients = [socket.create_connection((address.hostname, address.port)) for _ in range(128)]
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            count = 0
            while app.seen < len(clients) and count < 1000:
                await asyncio.sleep(0)
                count += 1
            for client in clients:
                client.close()
        return count

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(passes()) < 64
