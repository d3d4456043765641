"""Many requests, headers or chunks at once, without a key: who streams beside them notices nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from support.bystander import bystander, forget_peak, memory
from support.engine_fixtures import Tiny
from support.selection import mostly_slow
from support.server_process import Serving, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tiny_text: Tiny) -> AsyncIterator[Serving]:
    async with serving(tiny_text.model, "--served-model-name", "tiny", "--api-key", "sk-user") as server:
        yield server


GET = b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"

Address = tuple[str, int]


async def sent(address: Address, data: bytes, *, read: bool = True) -> int:
    """Bytes of the answers to ``data``, for as long as they come within a second of each other."""
    reader, writer = await asyncio.open_connection(*address)
    size = 0

    async def taken() -> None:
        nonlocal size
        part = b"."
        while part:
            async with asyncio.timeout(1):
                part = await reader.read(2**16)
            size += len(part)

    taking = asyncio.create_task(taken()) if read else None
    try:
        writer.write(data)
        async with asyncio.timeout(5):
            await writer.drain()
        if taking is not None:
            await taking
    except (OSError, TimeoutError):
        pass
    finally:
        if taking is not None:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
        writer.transport.abort()
    return size


async def unread(address: Address) -> None:
    """Answers that nobody takes."""
    await asyncio.gather(*(sent(address, (GET % b"/") * 8000, read=False) for _ in range(100)))


async def without_carriage_returns(address: Address) -> None:
    await asyncio.gather(*(sent(address, b"GET / HTTP/1.1\n\n" * 15_000) for _ in range(10)))


async def pages(address: Address) -> None:
    """All that can be had without a key or with any, as text that the server has to make."""
    paths = (b"/docs", b"/docs/openapi.json", b"/metrics", b"/", b"/v1/models", b"/tokenizer_info")
    head = b"GET %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-user\r\n\r\n"
    await asyncio.gather(*(sent(address, head % path) for path in paths * 60))


async def many_headers(address: Address) -> None:
    head = b"GET / HTTP/1.1\r\n"
    floods = [
        head + b"a:b\r\n" * 10_000 + b"\r\n",
        head + b"a:b\r\n" * 250 + b"\r\n",
        b"GET /?" + b"&a" * 4000,
    ]
    floods += [
        b"GET /" + b"%41" * 2000 + b" HTTP/1.1\r\n\r\n",
        b"\r\n" * 100_000,
        b"GET / HTTP/1.1\r\n" * 10_000,
    ]
    await asyncio.gather(*(sent(address, flood * (1 + 300_000 // len(flood))) for flood in floods * 5))


async def tiny_chunks(address: Address) -> None:
    chunks = b"1\r\n \r\n" * 150_000
    trailers = CHUNKED + b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 20_000 + b"\r\n"
    texts = CHUNKED + b"4\r\n\r\n\r\n\r\n" * 100_000
    bodies = [CHUNKED + chunks, CHUNKED + chunks + b"0\r\n\r\n", trailers, texts]
    await asyncio.gather(*(sent(address, body) for body in bodies * 5))


async def refused_bodies(address: Address) -> None:
    post = HEAD + b"content-length: 2\r\n\r\n{}"
    large = HEAD + b"content-length: 900000000\r\n\r\n" + b" " * 3_000_000
    await asyncio.gather(*(sent(address, data) for data in [post * 2000, large, large * 2] * 5))


async def single_bytes(address: Address) -> None:
    async def trickle() -> None:
        _, writer = await asyncio.open_connection(*address)
        with contextlib.suppress(OSError):
            for byte in (GET % b"/") * 4:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
        writer.transport.abort()

    await asyncio.gather(*(trickle() for _ in range(200)))


ATTACKS = [
    unread,
    without_carriage_returns,
    pages,
    many_headers,
    tiny_chunks,
    refused_bodies,
    single_bytes,
]


@pytest.mark.parametrize("attack", mostly_slow(ATTACKS, many_headers))
async def test_a_flood_holds_up_nobody(attack: Callable[[Address], Awaitable[None]], server: Serving) -> None:
    forget_peak(server.process.pid)
    before = memory(server.process.pid)
    async with bystander(server.url, key="sk-user") as seen:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(attack(server.address), 8)
    assert memory(server.process.pid, "VmHWM") - before < 200 * 2**20
    print(f"{attack.__name__}: {seen.largest_gap:.3f} s")
    seen.check()
