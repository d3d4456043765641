"""The gateway when Ray's head is gone: accepted requests go on, new ones are refused, and then it ends."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from support.waiting import SECONDS, until

from aioengine import EngineConfig
from aioengine.errors import EngineDead, EngineStopped
from aioengine.fleet import FleetConfig, cluster
from aioengine.fleet.gateway import hangs
from aioengine.fleet.gateway.client import FleetClient

pytest.importorskip("ray.exceptions", reason="Ray has no wheel for this system or Python")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(hangs, "LOST_SECONDS", 0.1)


class Listener:
    """Takes the place of Ray's head. While it ``hangs``, the system accepts connections, and nobody
    answers."""

    def __init__(self) -> None:
        self.hangs = False

    async def open(self, port: int = 0) -> str:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", port)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(len(hangs.PREFACE)) == hangs.PREFACE and not self.hangs:
            writer.write(b"\0")
        await reader.read()
        writer.close()

    async def close(self) -> None:
        self._server.close()
        await self._server.wait_closed()


@pytest.mark.usefixtures("quick")
async def test_the_gateway_ends_when_its_requests_have() -> None:
    listener = Listener()
    address = await listener.open()
    plan: Any = None
    client = FleetClient(FleetConfig(engine=EngineConfig(model="tiny")), None, plan, None, None)
    client._state = "running"
    client.watch_head(address)
    dead = asyncio.ensure_future(client.until_dead())
    call: Any = SimpleNamespace(ended=False, fail=lambda error: None)
    client._ids["open"] = call
    await listener.close()
    await until(lambda: client.failure is not None)
    assert client.state == "draining" and not dead.done()
    with pytest.raises(EngineStopped, match=f"Ray's head at {address} does not answer"):
        await client.complete([1])
    await listener.open(int(address.rpartition(":")[2]))  # it was started again, in time
    await until(lambda: client.failure is None)
    assert client.state != "draining" and not dead.done()
    await listener.close()
    await until(lambda: client.failure is not None)
    del client._ids["open"]
    assert isinstance(await dead, EngineDead)
    assert client.state == "dead"
    await client.stop()


async def test_a_head_that_hangs_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    watched = hangs.Head(await listener.open())
    assert await watched.answers()
    listener.hangs = True
    with monkeypatch.context() as patch:
        patch.setattr(hangs, "WATCH_SECONDS", 0.02)
        patch.setattr(hangs, "LOST_SECONDS", 0.1)
        assert "does not answer" in str(await watched.until_lost())
    listener.hangs = False
    assert await watched.is_back(lambda: True) and watched.failure is None
    await listener.close()


def test_a_head_that_hangs_does_not_keep_ray_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray._private import worker

    killed = threading.Event()
    head_process = SimpleNamespace(process=SimpleNamespace(kill=killed.set))
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(all_processes={"gcs_server": [head_process]}))
    monkeypatch.setattr(cluster, "HANGS_SECONDS", 0.01)
    monkeypatch.setattr(ray, "shutdown", lambda: killed.wait(SECONDS))
    cluster.Cluster(own=True).close()
    assert killed.is_set()


@pytest.mark.usefixtures("quick")
async def test_requests_that_take_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "FINISH_SECONDS", 0.1)
    listener = Listener()
    address = await listener.open()
    await listener.close()
    plan: Any = None
    client = FleetClient(FleetConfig(engine=EngineConfig(model="tiny")), None, plan, None, None)
    client._state = "running"
    call: Any = SimpleNamespace(ended=False, fail=lambda error: None)
    client._ids["open"] = call
    client.watch_head(address)
    assert isinstance(await client.until_dead(), EngineDead)
    await client.stop()
