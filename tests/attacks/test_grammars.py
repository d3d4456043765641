"""Grammars sent to a real server: they harm whoever sent them, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from support import hostile_grammars as hostile
from support.engine_fixtures import Tiny
from support.server_process import Serving, serving

MODEL = ("--served-model-name", "tiny")
pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["thread", "process"])
async def served(request: pytest.FixtureRequest, tiny_text: Tiny) -> AsyncIterator[Serving]:
    async with serving(tiny_text.model, *MODEL, "--executor", request.param) as served:
        yield served


@contextlib.asynccontextmanager
async def client(served: Serving) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.url, timeout=60, trust_env=False) as http:
        yield http


async def ask(http: httpx.AsyncClient, outputs: dict[str, Any], max_tokens: int = 40) -> httpx.Response:
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": max_tokens, "structured_outputs": outputs}
    return await http.post("/v1/completions", json=body)


def grammar_processes(served: Serving) -> list[psutil.Process]:
    """The worker and the children that try texts."""
    found = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "aioengine.grammars.worker" in process.cmdline():
                found.append(process)
    return found


async def test_a_client_that_leaves_takes_its_compile_along(served: Serving) -> None:
    async with client(served) as http:
        assert (await ask(http, {"regex": "warm"})).status_code == 200
        before = len(grammar_processes(served))
        for i in range(8):
            schema = json.loads(hostile.multiples(7919 + i, 7907))
            with pytest.raises(httpx.TimeoutException):
                await http.post(
                    "/v1/completions",
                    json={"model": "tiny", "prompt": "Hi", "structured_outputs": {"json": schema}},
                    timeout=0.2,
                )
        began = time.monotonic()
        while len(grammar_processes(served)) > before:
            assert time.monotonic() - began < 1.0, "nobody waits for it any more"
            await asyncio.sleep(0.02)


async def test_a_compile_is_bounded_by_the_requests_time(tiny_text: Tiny) -> None:
    flags = ("--request-timeout", "0.5")
    async with serving(tiny_text.model, *MODEL, *flags) as served, client(served) as http:
        assert (await ask(http, {"regex": "warm"})).status_code in (200, 408, 504)
        answer = await ask(http, {"json": json.loads(hostile.multiples(7919, 7907))})
        assert answer.status_code in (408, 504), answer.text


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_nothing_of_it_outlives_the_server(how: signal.Signals, tiny_text: Tiny) -> None:
    async with serving(tiny_text.model, *MODEL, "--grace-seconds", "1") as served, client(served) as http:
        assert (await ask(http, {"regex": "warm"})).status_code == 200
        attacks = [
            asyncio.create_task(ask(http, {"json": json.loads(hostile.multiples(7919 + i, 7907))}))
            for i in range(4)
        ]
        await asyncio.sleep(0.3)
        processes = grammar_processes(served)
        assert len(processes) >= 2, "the worker, and the child that tries a text"
        served.process.send_signal(how)
        began = time.monotonic()
        await served.process.wait()
        assert time.monotonic() - began < 10
        while any(map(psutil.pid_exists, (process.pid for process in processes))):
            assert time.monotonic() - began < 12
            await asyncio.sleep(0.02)
        await asyncio.gather(*attacks, return_exceptions=True)
