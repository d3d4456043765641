"""Bodies that come slowly, and many at once."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from support.bystander import bystander
from support.engine_fixtures import Tiny
from support.raw_http import POST as HEAD
from support.raw_http import connected
from support.server_fixtures import MODEL, Serve, until
from support.server_process import serving

from aioengine.server import routes
from aioengine.server.bounds import Bound
from aioengine.server.transport import body as module


async def test_one_client_leaves_room_for_others(tiny_text: Tiny) -> None:
    """Three addresses send as many bodies that stop short as they can; a fourth is served."""
    flags = ["--served-model-name", "tiny", "--max-body-bytes", "1000000"]
    async with serving(tiny_text.model, *flags) as server:
        writers: list[asyncio.StreamWriter] = []

        async def stop_short(address: str) -> bytes:
            reader, writer = await asyncio.open_connection(*server.address, local_addr=(address, 0))
            writers.append(writer)
            writer.write(HEAD + b"content-length: 1000000\r\n\r\n{" + b" " * 990_000)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 20)
                return (await asyncio.wait_for(reader.readuntil(b"\r\n"), 1))[9:12]
            return b"held"

        held = []
        async with bystander(server.url) as seen:
            for i in range(2, 5):
                statuses = await asyncio.gather(*(stop_short(f"127.0.0.{i}") for _ in range(40)))
                held.append(statuses.count(b"held"))
            body = json.dumps(
                {"model": "tiny", "prompt": "x", "max_tokens": 2, "user": "u" * 900_000}
            ).encode()
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 20))[9:12] == b"200"
        writers.append(writer)
        for writer in writers:
            writer.transport.abort()
        assert 14 <= held[0] <= 20 and held[0] > held[1] > held[2] > 0
    seen.check()


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
