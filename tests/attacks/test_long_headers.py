"""Headers as long as they may be, in forms that are dear to take apart, on routes of each kind."""

from __future__ import annotations

import asyncio
import gc

import pytest
from support.longest_hold import LongestHold
from support.selection import mostly_slow
from support.server_fixtures import Serve

LENGTH = 60_000
HOLD = 0.03
"""Seconds of processor time."""
NAMES = [
    *("accept", "accept-encoding", "authorization", "connection", "content-encoding", "content-type"),
    *("cookie", "expect", "host", "last-event-id", "traceparent", "x-api-key", "x-request-id"),
]
PARTS = ["a", " ", "a/b;q=0.1,", 'a;b="', "a=b; ", "Basic ", "%41", "\xff"]
ROUTES = [
    *("GET /metrics", "GET /v1/models", "GET /nowhere", "GET /docs", "PUT /health"),
    *("POST /v1/completions", "POST /rerank", "POST /v1/upload_lora_adapter?lora_name=x"),
]


@pytest.mark.timed
@pytest.mark.parametrize("route", mostly_slow(ROUTES, ROUTES[0]))
async def test_a_long_header_holds_nobody_up(route: str, serve: Serve) -> None:
    settings = {"max_upload_bytes": 1000}
    async with serve(settings=settings) as served:
        host, _, port = served.url.removeprefix("http://").rpartition(":")

        async def status(name: str, part: str) -> int:
            value = (part * (LENGTH // len(part) + 1))[:LENGTH]
            head = f"{route} HTTP/1.1\r\nconnection: close\r\n{name}: {value}\r\ncontent-length: 2\r\n\r\n"
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode("latin-1") + b"{}")
            answer = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 "), (name, part, answer[:100])
            return int(answer[9:12])

        await status("x", "x")
        gc.freeze()  # as a server does when it begins
        hold = LongestHold()
        found = {await status(name, part) for name in NAMES for part in PARTS}
        gc.unfreeze()
        assert max(found) < 500
        assert hold.seconds < HOLD
