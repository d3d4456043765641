"""Gateways and replicas in this process, whose engines only know which adapters they were told to have."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from support.adapter_infos import adapter_info

from aioengine import EngineConfig
from aioengine.errors import AdapterNotFound
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.replica import EngineReplica
from aioengine.info import AdapterInfo

CONFIG = FleetConfig(engine=EngineConfig(model="tiny"))


class Engine:
    """An engine's adapters: it has what it was told to have."""

    seconds = 0.0
    """How long it reads."""

    def __init__(self) -> None:
        self.has: dict[str, str] = {}
        """Where each adapter was read."""
        self.prepared: dict[str, str] = {}
        """The same, of what is prepared."""
        self.pinned: set[str] = set()
        self._versions: dict[str, int] = {}
        self._count = 0
        self._locks = defaultdict[str, asyncio.Lock](asyncio.Lock)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    async def prepare_adapter(self, name: str, path: str | None = None, *, read: bool = True) -> AdapterInfo:
        async with self._locks[name]:
            self.discard_adapter(name)
            await asyncio.sleep(self.seconds if read else 0.0)
            self.prepared[name] = path or name
        return self._info(name)

    def commit_adapter(self, name: str) -> AdapterInfo:
        self.has[name] = self.prepared.pop(name)
        self._count += 1
        self._versions[name] = self._count
        return self._info(name)

    async def pin_adapter(self, name: str, *, force: bool = False) -> AdapterInfo:
        self.pinned.add(name)
        return self._info(name)

    async def unpin_adapter(self, name: str) -> AdapterInfo:
        self.pinned.discard(name)
        return self._info(name)

    def discard_adapter(self, name: str) -> None:
        self.prepared.pop(name, None)

    async def load_adapter(self, name: str, path: str | None = None) -> AdapterInfo:
        return self._info(name)

    async def unload_adapter(self, name: str, *, force: bool = False) -> None:
        if self.has.pop(name, None) is None:
            raise AdapterNotFound("nobody has loaded it", name=name)

    async def stop(self) -> None:
        pass

    def _info(self, name: str) -> AdapterInfo:
        return adapter_info(name, version=self._versions.get(name, 0), digest=name, location="disk")


class Replica(EngineReplica):
    """A replica whose engine is an :class:`Engine`."""

    async def start_engine(self) -> Any:
        return Engine()

    def __del__(self) -> None:  # type: ignore[override] # nobody would await it
        pass


async def replica() -> Any:
    made = Replica.__new__(Replica)
    await made.__init__(CONFIG)  # type: ignore[misc] # Serve does it so
    return made


class Gateway:
    """A gateway to replicas. ``before``: awaited before a replica gets a call, with what it is to do."""

    def __init__(self, one: Any, before: Any = None, *others: Any) -> None:
        async def call(action: str, arguments: dict[str, Any], to: str) -> Any:
            if before is not None:
                await before(action)
            return await (one, *others)[int(to[1:])].adapter(action, dict(arguments))

        def remote(action: str, arguments: dict[str, Any], to: str) -> asyncio.Future[Any]:
            # As with Ray it goes on when its caller does not wait for it any more.
            return asyncio.shield(asyncio.ensure_future(call(action, arguments, to)))

        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
        self.members = Members(CONFIG, handle, gateway=f"gateway-{id(self)}")
        self.adapters = FleetAdapters(CONFIG, self.members)
        for number in range(1 + len(others)):
            channel: Any = SimpleNamespace(replica=f"r{number}")
            self.members.members[f"r{number}"] = Member(channel, None)  # type: ignore[arg-type]
        self.member = self.members.members["r0"]

    async def load(self, name: str, *, replace: bool = False) -> AdapterInfo:
        return await self.adapters.load_adapter(name, name, pin=False, replace=replace)

    async def joins(self) -> None:
        """The replica is back: as after the loss of this gateway's channel to it."""
        for listener in self.members.on_join:
            listener(self.member)
        while not self.member.ready:
            await asyncio.sleep(0.2)
