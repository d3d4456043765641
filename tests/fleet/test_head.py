"""The gateway when Ray's head is gone: accepted requests go on, new ones are refused, and then it ends."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ray_head import RayHead
from support.small_fleet import client_of
from support.waiting import SECONDS, until

from aioengine.errors import EngineDead, EngineStopped
from aioengine.fleet import cluster
from aioengine.fleet.gateway import head


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(head, "LOST_SECONDS", 0.5)


@pytest.mark.usefixtures("quick")
async def test_the_gateway_ends_when_its_requests_have() -> None:
    listener = RayHead()
    address = listener.open()
    client = client_of()
    client.watch_head(address)
    dead = asyncio.ensure_future(client.until_dead())
    call: Any = SimpleNamespace(ended=False, fail=lambda error: None)
    client._ids["open"] = call
    await asyncio.to_thread(listener.close)
    await until(lambda: client.failure is not None)
    assert client.state == "draining" and not dead.done()
    with pytest.raises(EngineStopped, match=f"Ray's head at {address} does not answer"):
        await client.complete([1])
    listener.open(int(address.rpartition(":")[2]))  # it was started again, in time
    await until(lambda: client.failure is None)
    assert client.state != "draining" and not dead.done()
    await asyncio.to_thread(listener.close)
    await until(lambda: client.failure is not None)
    del client._ids["open"]
    assert isinstance(await dead, EngineDead)
    assert client.state == "dead"
    await client.stop()


@pytest.mark.usefixtures("quick")
async def test_a_head_that_hangs_is_lost() -> None:
    listener = RayHead()
    watched = head.Head(listener.open())
    assert await watched.answers()
    listener.hangs = True
    assert "does not answer" in str(await watched.until_lost(lambda: False))
    listener.hangs = False
    assert await watched.answers()
    await asyncio.to_thread(listener.close)


def test_a_head_that_hangs_does_not_keep_ray_from_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    program = shutil.copy(str(shutil.which("sleep")), tmp_path / "gcs_server")
    with subprocess.Popen([program, str(SECONDS)]) as hanging:
        monkeypatch.setattr(cluster, "HANGS_SECONDS", 0.01)
        monkeypatch.setattr(ray, "shutdown", hanging.wait)
        cluster.Cluster(own=True).close()
    assert hanging.returncode == -signal.SIGKILL


@pytest.mark.usefixtures("quick")
async def test_requests_that_take_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "FINISH_SECONDS", 0.1)
    listener = RayHead()
    address = listener.open()
    await asyncio.to_thread(listener.close)
    client = client_of()
    call: Any = SimpleNamespace(ended=False, fail=lambda error: None)
    client._ids["open"] = call
    client.watch_head(address)
    assert isinstance(await client.until_dead(), EngineDead)
    await client.stop()
