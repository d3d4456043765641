"""Clients that read nothing, speak an old HTTP, or come and go: who streams beside them notices nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from support.bystander import bystander, memory
from support.engine_fixtures import Tiny
from support.server_process import Serving, serving

pytestmark = pytest.mark.slow

FLAGS = ("--served-model-name", "tiny", "--kv-cache-memory", "16MiB")
STREAM = {"model": "tiny", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}


def request(method: str, path: str, body: object = None, version: str = "1.1") -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def leave_after(server: Serving, data: bytes, seconds: float) -> None:
    """Send it, from an address of its own, read nothing, and break the connection."""
    with contextlib.suppress(OSError):
        local = ("127.0.0.2", 0)
        _, writer = await asyncio.open_connection(*server.address, limit=1, local_addr=local)
        writer.write(data)
        await asyncio.sleep(seconds)
        writer.transport.abort()


async def test_streams_that_nobody_reads_take_bounded_memory(tiny_text: Tiny) -> None:
    """400 of them, with log-probabilities, which make 60 KB of each token."""
    data = request("POST", "/v1/completions", {**STREAM, "logprobs": 20})
    async with serving(tiny_text.model, *FLAGS) as server, bystander(server.url) as seen:
        before = memory(server.process.pid)
        await asyncio.gather(*(leave_after(server, data, 3.0) for _ in range(400)))
        grown = memory(server.process.pid, "VmHWM") - before
    assert grown < 300 * 2**20
    seen.check()
