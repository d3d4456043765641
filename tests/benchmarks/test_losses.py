"""A stream that fails while a fleet loses a replica is one that is not complete, and prints nothing."""

from __future__ import annotations

import asyncio
import gc
import os
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from benchmarks.server import losses


@pytest.mark.slow
async def test_streams_that_fail_are_counted_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(client: httpx.AsyncClient, index: int, tokens: int, at: list[float]) -> None:
        at += [0.0, 0.25][: 1 + index % 2]
        if index % 2 == 0:
            raise httpx.RemoteProtocolError("the server is gone")

    killed: list[int] = []
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unheard.append(context))
    monkeypatch.setattr(losses, "stream", fail)
    monkeypatch.setattr(losses, "KILL_SECONDS", 0.0)
    monkeypatch.setattr(os, "kill", lambda pid, _signal: killed.append(pid))
    server = SimpleNamespace(url="http://127.0.0.1:1", replicas=lambda: [SimpleNamespace(pid=7)])
    assert await losses.loss(cast(losses.Server, server), 0, 6, 2) == (3, 0.25)
    gc.collect()
    assert killed == [7] and unheard == []
