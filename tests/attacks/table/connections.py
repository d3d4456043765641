"""Attacks by many connections, and by how requests are sent."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Sequence

from attacks.table.target import MODEL, Target, statuses

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


async def pipelined(target: Target) -> str:
    async def flood() -> None:
        reader, writer = await asyncio.open_connection(*target.served.address)
        with contextlib.suppress(OSError):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 13_900)
            while await reader.read(2**18):
                pass

    floods = [asyncio.create_task(flood()) for _ in range(30)]
    await asyncio.sleep(1)
    began = time.monotonic()
    status = statuses([await target.http.get("/health")])
    took = time.monotonic() - began
    await asyncio.wait(floods, timeout=2)
    for task in floods:
        task.cancel()
    return f"/health {status} in {took:.2f} s"


async def bodies_in_flight(target: Target) -> str:
    body = HEAD + b"content-length: 8000000\r\n\r\n{" + b" " * 7_900_000
    return statuses(await asyncio.gather(*(status_of(target, body, seconds=4) for _ in range(150))))


async def streams_cut_off(target: Target) -> str:
    """For a second, connect, ask for a stream, and leave within a tenth of a second."""
    body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 200, "stream": True}).encode()
    return await begun_and_left(target, body, seconds=1, at_once=60, longest=0.1)


async def refused_requests(target: Target) -> str:
    """For a second, send requests with a field that does not exist, one after the other."""
    request = message(b'{"model": "x", "promt": ' + b"[" * 60 + b"]" * 60 + b"}")
    return await again_and_again(target, [request])


async def many_connections(target: Target) -> str:
    body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 2}).encode()
    found = await asyncio.gather(*(status_of(target, message(body)) for _ in range(1_500)))
    assert "closed" not in found
    return statuses(found)


async def lists(target: Target) -> str:
    """For a second, ask for lists of all names and series, one after the other, and begin live pages."""
    wanted = [b"/v1/models", b"/metrics", b"/v1/models/nobody", b"/events"]
    compressed = b"accept: application/openmetrics-text\r\naccept-encoding: gzip\r\n"
    get = b"GET %b HTTP/1.1\r\nhost: localhost\r\n%b\r\n"
    return await again_and_again(target, [get % (path, compressed) for path in wanted])


async def many_choices(target: Target) -> str:
    """For a second, ask for 128 streams in one, with log-probabilities, and leave; then ask and stay."""
    ask = {"model": MODEL, "prompt": "Hi", "n": 128, "max_tokens": 500, "stream": True, "logprobs": 20}
    left = await begun_and_left(target, json.dumps(ask).encode(), seconds=1, at_once=20, longest=0.3)
    answer = await target.ask(n=128)
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(128))
    return left


async def long_headers(target: Target) -> str:
    """Send headers as long as they may be, in forms that are dear to take apart, to routes of each kind."""
    names = [
        *("accept", "accept-encoding", "authorization", "connection", "content-encoding", "content-type"),
        *("cookie", "expect", "host", "last-event-id", "traceparent", "x-api-key", "x-request-id"),
    ]
    parts = ["a", " ", "a/b;q=0.1,", 'a;b="', "a=b; ", "Basic ", "%41", "\xff"]
    routes = [
        *("GET /metrics", "GET /v1/models", "GET /nowhere", "GET /docs", "PUT /health"),
        *("POST /v1/completions", "POST /rerank", "POST /v1/upload_lora_adapter?lora_name=x"),
    ]

    found = []
    for route, name, part in itertools.product(routes, names, parts):
        value = (part * (60_000 // len(part) + 1))[:60_000]
        head = f"{route} HTTP/1.1\r\nconnection: close\r\n{name}: {value}\r\ncontent-length: 2\r\n\r\n"
        found.append(await status_of(target, head.encode("latin-1") + b"{}"))
    assert {status[0] for status in found} <= {"2", "4"}
    return statuses(found)


async def unread_streams(target: Target) -> str:
    """Ask for 400 streams with log-probabilities, which make 60 KB of each token; read nothing, and leave."""
    ask = {"model": MODEL, "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    data = message(json.dumps({**ask, "logprobs": 20}).encode())

    async def one() -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*target.served.address, limit=1)
            writer.write(data)
            await asyncio.sleep(2)
            writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(400)))
    return "left (400x)"


async def tiny_chunks(target: Target) -> str:
    """Send 200,000 chunks of a byte in each of ten bodies."""
    parts = HEAD + b"transfer-encoding: chunked\r\n\r\n", *[b"1\r\n \r\n" * 20_000] * 10, b"0\r\n\r\n"
    return statuses(await asyncio.gather(*(status_of(target, *parts) for _ in range(10))))


async def asked_before_sent(target: Target) -> str:
    """Open 2,000 connections that ask whether they may send, and then send nothing."""
    head = HEAD + b"expect: 100-continue\r\ncontent-length: 100\r\n\r\n"
    return statuses(await asyncio.gather(*(status_of(target, head, stays=1) for _ in range(2_000))))


async def status_of(target: Target, *parts: bytes, seconds: float = 60, stays: float = 0) -> str:
    """Send these on a connection of its own. Returns the status that comes, or what comes instead."""
    reader, writer = await asyncio.open_connection(*target.served.address)
    try:
        async with asyncio.timeout(seconds):
            for part in parts:
                writer.write(part)
                await writer.drain()
            return (await reader.readuntil(b"\r\n"))[9:12].decode()
    except TimeoutError:
        return "held"
    except (OSError, asyncio.IncompleteReadError):
        return "closed"
    finally:
        await asyncio.sleep(stays)
        writer.transport.abort()


async def again_and_again(target: Target, requests: Sequence[bytes], seconds: float = 1) -> str:
    """Have 30 connections send requests, one after the other. Returns how often each status came."""
    seen: list[str] = []

    async def one(request: bytes) -> None:
        reader, writer = await asyncio.open_connection(*target.served.address)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            seen.append(head[9:12].decode())
            lengths = head.lower().partition(b"content-length: ")[2].split()
            while lengths:
                await reader.readexactly(int(lengths[0]))
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                seen.append(head[9:12].decode())
                lengths = head.lower().partition(b"content-length: ")[2].split()
            await reader.readuntil(b"\n\n")  # the first event of a live page
        finally:
            writer.transport.abort()

    async def more(request: bytes) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await one(request)

    tasks = [asyncio.create_task(more(requests[i % len(requests)])) for i in range(30)]
    await asyncio.wait(tasks, timeout=seconds)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return statuses(sorted(seen))


async def begun_and_left(target: Target, body: bytes, *, seconds: float, at_once: int, longest: float) -> str:
    """Ask for a stream and leave within ``longest`` seconds, again and again."""
    draw = random.Random(0)
    end = time.monotonic() + seconds
    count = 0

    async def one() -> None:
        nonlocal count
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(*target.served.address)
                writer.write(message(body))
                await asyncio.sleep(draw.random() * longest)
                writer.transport.abort()
                count += 1

    await asyncio.gather(*(one() for _ in range(at_once)))
    return f"{count:,} streams"


def message(body: bytes) -> bytes:
    """Return the bytes of a request for a completion."""
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
