"""Bodies that come slowly, and many at once."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.raw_http import POST as HEAD
from support.raw_http import connected
from support.server_fixtures import MODEL, Serve, until

from aioengine.server import routes
from aioengine.server.bounds import Bound
from aioengine.server.transport import body as module


async def test_the_budget_is_given_back_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FREE_BYTES", 100)
    monkeypatch.setattr(routes, "BODIES", Bound(1))
    async with serve(settings={"max_body_bytes": 10_000}) as served:
        budget = served.app.context.bodies
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2, "user": "u" * 6000}

        _, writer = await connected(served.url, HEAD + b"content-length: 9000\r\n\r\n{" + b" " * 8000)
        await until(lambda: budget.held == 7901)
        refused = await served.http.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"]
        small = await served.http.post("/v1/completions", json={**body, "user": "x"})
        assert small.status_code == 200 and budget.held == 7901
        writer.transport.abort()
        await until(lambda: budget.held == 0)

        for change in ({}, {"stream": True}, {"temperature": 9}, {"prompt": "y" * 3000}, {"model": "no"}):
            await served.http.post("/v1/completions", json={**body, **change})
            assert budget.held == 0
        for path in ("/tokenize", "/nowhere"):
            await served.http.post(path, content=json.dumps({"prompt": "x" * 9000}))
            assert budget.held == 0
        # While an answer is on its way nothing is held.
        long = {**body, "max_tokens": 100, "ignore_eos": True, "stream": True}
        async with served.http.stream("POST", "/v1/completions", json=long) as answer:
            await anext(answer.aiter_lines())
            assert served.app.active == 1 and budget.held == 0


async def test_a_body_has_a_time_in_all(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte after byte, each soon after the last."""
    monkeypatch.setattr(module, "MIN_RATE", 1000)
    async with serve(settings={"read_timeout": 0.3}) as served:
        reader, writer = await connected(served.url, HEAD + b"content-length: 100000\r\n\r\n{")

        async def trickle() -> None:
            while True:
                writer.write(b" ")
                await asyncio.sleep(0.02)

        task = asyncio.create_task(trickle())
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 20)).startswith(b"HTTP/1.1 408")
        task.cancel()
        writer.transport.abort()
