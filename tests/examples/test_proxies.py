"""Two servers behind a real proxy are restarted one after the other while requests come: none fails."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from support.engine_fixtures import Tiny, tiny_text
from support.ports import held_port
from support.server_process import Serving, serving

pytestmark = pytest.mark.slow

__all__ = ["tiny_text"]

DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"
PROXIES = {
    "haproxy": ("haproxy.cfg", ["haproxy", "-db", "-f"]),
    "nginx": ("nginx.conf", ["nginx", "-g", "daemon off; pid nginx.pid; error_log stderr;", "-c"]),
}
PER_SECOND = 50


@contextlib.asynccontextmanager
async def proxy(name: str, ports: list[int], folder: Path) -> AsyncIterator[str]:
    """The example, with other ports; ``ports`` are its own and the engines'."""
    file, command = PROXIES[name]
    text = (DEPLOY / file).read_text()
    for given, port in zip(("8080", "8001", "8002"), ports, strict=True):
        text = text.replace(f":{given}", f":{port}")
    own = folder / file
    own.write_text(text)
    if name == "nginx":
        command = [*command[:-1], "-p", str(folder), command[-1]]
    process = await asyncio.create_subprocess_exec(*command, str(own), stderr=asyncio.subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        await process.wait()


async def end(server: Serving) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert await server.end() == 0


@pytest.mark.parametrize("name", PROXIES)
async def test_a_rolling_restart_fails_no_request(name: str, tiny_text: Tiny, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    answers: Counter[str] = Counter()

    async def send(http: httpx.AsyncClient) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        try:
            answer = await http.post("/v1/completions", json=body)
            answers[str(answer.status_code)] += 1
        except httpx.HTTPError as error:
            answers[repr(error)] += 1

    async def load(url: str, stop: asyncio.Event) -> None:
        async with (
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http,
            asyncio.TaskGroup() as tasks,
        ):
            while not stop.is_set():
                tasks.create_task(send(http))
                await asyncio.sleep(1 / PER_SECOND)

    def started(port: int) -> contextlib.AbstractAsyncContextManager[Serving]:
        flags = ["--served-model-name", "tiny", "--drain-delay", "3", "--port", str(port)]
        return serving(tiny_text.model, *flags)

    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as servers:
        ports = [servers.enter_context(held_port()) for _ in range(3)]
        first = await servers.enter_async_context(started(ports[1]))
        second = await servers.enter_async_context(started(ports[2]))
        url = await servers.enter_async_context(proxy(name, ports, tmp_path))
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http, asyncio.timeout(60):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(0.05)
        loading = asyncio.create_task(load(url, stop))
        for server, port in ((first, ports[1]), (second, ports[2])):
            await asyncio.sleep(1)
            await end(server)
            await servers.enter_async_context(started(port))
        await asyncio.sleep(1)
        stop.set()
        await loading
    assert set(answers) == {"200"} and answers["200"] > PER_SECOND, answers
