"""Clients that read nothing, speak an old HTTP, or come and go: who streams beside them notices nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from pathlib import Path

import httpx
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


async def test_pages_that_are_left_at_once(tiny_text: Tiny) -> None:
    """The page, its streams, metrics, the description, models, probes: in turn, each broken off early."""
    paths = ("/", "/metrics", "/events", "/docs", "/docs/openapi.json", "/v1/models", "/health", "/nowhere")
    async with serving(tiny_text.model, *FLAGS) as server:
        async with bystander(server.url) as seen:
            before = memory(server.process.pid)
            for i in range(6):
                await asyncio.gather(
                    *(
                        leave_after(server, request("GET", path), 0.01 * i)
                        for path in paths
                        for _ in range(25)
                    )
                )
            grown = memory(server.process.pid, "VmHWM") - before
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as http:
            assert (await http.get("/metrics")).status_code == 200
    assert grown < 150 * 2**20
    seen.check()


async def test_many_adapters_are_loaded_and_left_at_once(tiny_text: Tiny, tmp_path: Path) -> None:
    """300 of them, by request and by use, each client leaving after a moment."""
    root = tmp_path / "root"
    shutil.copytree(tiny_text.adapters["a"], root / "x0")
    for i in range(1, 300):
        (root / f"x{i}").mkdir()
        for name in os.listdir(root / "x0"):
            os.link(root / "x0" / name, root / f"x{i}" / name)
    async with serving(tiny_text.model, *FLAGS, "--adapter-root", str(root)) as server:
        async with bystander(server.url) as seen:
            loads = [
                request(
                    "POST", "/v1/load_lora_adapter", {"lora_name": f"x{i}", "lora_path": str(root / f"x{i}")}
                )
                for i in range(300)
            ]
            uses = [request("POST", "/v1/completions", {**STREAM, "model": f"x{i}"}) for i in range(300)]
            await asyncio.gather(*(leave_after(server, data, 0.5) for data in (*loads, *uses)))
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http:
            body = {"model": "x299", "prompt": "Hi", "max_tokens": 2}
            assert (await http.post("/v1/completions", json=body)).status_code == 200
    seen.check()
