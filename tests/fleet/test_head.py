"""The door when Ray's head is gone: accepted requests go on, new ones are refused, and then it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.waiting import until

from aioengine import EngineConfig
from aioengine.errors import EngineDead, EngineStopped
from aioengine.fleet import FleetConfig
from aioengine.fleet.door import head
from aioengine.fleet.door.client import FleetClient

pytest.importorskip("ray.exceptions", reason="Ray has no wheel for this system or Python")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(head, "LOST_SECONDS", 0.1)


class Listener:
    """Takes the place of Ray's head."""

    async def open(self, port: int = 0) -> str:
        self._server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        await self._server.wait_closed()


@pytest.mark.usefixtures("quick")
async def test_the_door_ends_when_its_requests_have() -> None:
    listener = Listener()
    address = await listener.open()
    plan: Any = None
    client = FleetClient(FleetConfig(engine=EngineConfig(model="tiny")), None, plan, None, None)
    client._state = "running"
    client.watch_head(address)
    dead = asyncio.ensure_future(client.until_dead())
    client._ids["open"] = plan
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


@pytest.mark.usefixtures("quick")
async def test_requests_that_take_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "FINISH_SECONDS", 0.1)
    listener = Listener()
    address = await listener.open()
    await listener.close()
    plan: Any = None
    client = FleetClient(FleetConfig(engine=EngineConfig(model="tiny")), None, plan, None, None)
    client._state = "running"
    client._ids["open"] = plan
    client.watch_head(address)
    assert isinstance(await client.until_dead(), EngineDead)
    await client.stop()
