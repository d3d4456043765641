"""A log that nobody reads."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time

import httpx
import pytest
from support import preloaded
from support.engine_fixtures import Tiny
from support.server_process import SMALL

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_a_log_that_nobody_reads_stops_nothing(log_format: str, tiny_text: Tiny) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reading, writing = os.pipe()
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", "--model", str(tiny_text.model), "--served-model-name", "tiny", "--port", str(port)]
    arguments += ["--log-format", log_format, *SMALL]
    process = preloaded.start("aioengine", *arguments, environment=os.environ, errors=writing)
    os.close(writing)
    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as http:
            async with asyncio.timeout(60):
                while True:
                    try:
                        if (await http.get("/ready")).status_code == 200:
                            break
                    except httpx.ConnectError:
                        pass
                    await asyncio.sleep(0.05)

            request = (
                f"GET /nowhere{'x' * 150} HTTP/1.1\r\nhost: 127.0.0.1\r\nx-request-id: {'y' * 120}\r\n\r\n"
            )

            async def client() -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for _ in range(300):
                    writer.write(request.encode())
                    async with asyncio.timeout(10):
                        head = await reader.readuntil(b"\r\n\r\n")
                        length = re.search(rb"content-length: (\d+)", head)
                        assert head.startswith(b"HTTP/1.1 404") and length is not None
                        await reader.readexactly(int(length[1]))
                writer.close()

            await asyncio.gather(*(client() for _ in range(16)))
            assert (await http.get("/health")).status_code == 200
            answer = await http.post(
                "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 3}
            )
            assert answer.status_code == 200
            found = re.search(
                r"aioengine_log_dropped_total\{[^}]*\} (\d+)", (await http.get("/metrics")).text
            )
        assert found is not None and int(found[1]) > 0
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert await asyncio.wait_for(process.wait(), 20) == 0
        assert time.monotonic() - begin < 10
    finally:
        os.close(reading)
        if process.returncode is None:
            process.kill()
            await process.wait()
