"""Routers see the size of each adapter, as the replicas that have read it report it; without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from support.adapter_infos import adapter_info

from aioengine import EngineConfig
from aioengine.errors import EngineStopped
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway import discovery
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.wire import Frame, Hello, Residency, Status, encode_frame
from aioengine.info import AdapterInfo, AdapterLocation
from aioengine.schedulers.routing import AdapterView, Location, Report


class Channel:
    """A replica's stream, and Serve's handle of it: sends what it is told to send."""

    def __init__(self) -> None:
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.send(Frame(hello=Hello("r0", 1, "here", "actor", 2, 4, 8, 1000, "")))

    def send(self, frame: Frame) -> None:
        self._frames.put_nowait(encode_frame(frame))

    def holds(self, *adapters: AdapterInfo) -> None:
        status = Status(Report(0.0, 0, 0, 0, 0, 0, 0, 1000, {}), 0.0, False, "running")
        self.send(Frame(status=status, residency=Residency([], list(adapters))))

    def options(self, *, method_name: str, stream: bool = False) -> SimpleNamespace:
        return SimpleNamespace(remote=self._read if stream else self._answer)

    async def _answer(self, *arguments: Any, to: str | None = None) -> None:
        pass

    async def _read(self, gateway: str, to: str) -> AsyncIterator[bytes]:
        while True:
            yield await self._frames.get()


def info(name: str, location: AdapterLocation, nbytes: int, version: int = 1) -> AdapterInfo:
    return adapter_info(name, version=version, bytes=nbytes, location=location)


async def test_what_a_replica_holds_has_its_size() -> None:
    channel = Channel()
    members = Members(
        FleetConfig(engine=EngineConfig(model="tiny"), name="sizes"), channel, gateway="gateway"
    )
    reported = asyncio.Event()

    def noted(member: Member) -> None:
        reported.set()

    members.on_residency.append(noted)

    async def adapters(*held: AdapterInfo) -> dict[str, AdapterView]:
        reported.clear()
        channel.holds(*held)
        await reported.wait()
        await asyncio.sleep(0)  # the state is told in the same turn of the loop
        return dict(members.state.view.adapters)

    members.start()
    discovery.replicas_changed("sizes", {"r0"})
    try:
        found = await adapters(info("a", "slot", 100), info("b", "loading", 0))
        assert {name: adapter.nbytes for name, adapter in found.items()} == {"a": 100, "b": 0}
        # A replacement is read while requests still use the old version.
        found = await adapters(info("a", "cpu", 300, 2), info("a", "slot", 100), info("b", "cpu", 50))
        assert {name: adapter.nbytes for name, adapter in found.items()} == {"a": 300, "b": 50}
        assert members.state.view.replicas["r0"].location("a") is Location.CPU
        found = await adapters(info("b", "cpu", 50))
        assert found["b"].nbytes == 50
        assert "a" not in found, "nobody has it"
    finally:
        await members.stop(EngineStopped("the test is over"))
