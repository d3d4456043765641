"""Gateways and replicas in this process, whose engines only know which adapters they were told to have."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from support.adapter_infos import adapter_info
from support.fleet_cases import LIMITS

from aioengine import EngineConfig
from aioengine.errors import AdapterNotFound
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.client import FleetClient
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.replica import EngineReplica
from aioengine.fleet.wire import Residency
from aioengine.info import AdapterInfo

CONFIG = FleetConfig(engine=EngineConfig(model="tiny"))


class Engine:
    """An engine's adapters: it has what it was told to have."""

    seconds = 0.0
    """How long it reads."""

    def __init__(self) -> None:
        self.disk: dict[str, str] = {}
        """What is at a path: if it is not in here the path itself, and nothing if it is ""."""
        self.has: dict[str, str] = {}
        """What each adapter is."""
        self.prepared: dict[str, str] = {}
        """The same, of what is prepared."""
        self.pinned: set[str] = set()
        self._paths: dict[str, str] = {}
        self._prepared_paths: dict[str, str] = {}
        self._versions: dict[str, int] = {}
        self._count = 0
        self._locks = defaultdict[str, asyncio.Lock](asyncio.Lock)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    async def prepare_adapter(self, name: str, path: str | None = None, *, read: bool = True) -> AdapterInfo:
        async with self._locks[name]:
            self.discard_adapter(name)
            await asyncio.sleep(self.seconds if read else 0.0)
            where = self._prepared_paths[name] = path or self._paths.get(name, name)
            self.prepared[name] = self._content(name, where)
        return self._info(name, self.prepared[name], where)

    def commit_adapter(self, name: str) -> AdapterInfo:
        self.has[name], self._paths[name] = self.prepared.pop(name), self._prepared_paths[name]
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
        return self._info(name, self.has.get(name) or self._content(name, path or name))

    async def unload_adapter(self, name: str, *, force: bool = False) -> None:
        if self.has.pop(name, None) is None:
            raise AdapterNotFound("nobody has loaded it", name=name)

    async def stop(self) -> None:
        pass

    def residency(self) -> Residency:
        return Residency([], [self._info(name) for name in self.has])

    def _content(self, name: str, path: str) -> str:
        content = self.disk.get(path, path)
        if not content:
            raise AdapterNotFound("it is gone", name=name)
        return content

    def _info(self, name: str, content: str = "", path: str = "") -> AdapterInfo:
        return adapter_info(
            name,
            version=self._versions.get(name, 0),
            path=path or self._paths.get(name, name),
            digest=content or self.has.get(name, name),
            location="disk",
        )


class Replica(EngineReplica):
    """A replica whose engine is an :class:`Engine`."""

    async def start_engine(self) -> Any:
        return Engine()

    def __del__(self) -> None:  # type: ignore[override] # nobody would await it
        pass


async def replica(config: FleetConfig = CONFIG) -> Any:
    made = Replica.__new__(Replica)
    await made.__init__(config)  # type: ignore[misc] # Serve does it so
    return made


def join(members: Members, name: str) -> Any:
    """Have a replica join that takes orders, and does nothing with them. Returns its channel."""
    channel: Any = SimpleNamespace(replica=name, calls={}, send=lambda order: None, leaving=False)
    members.members[name] = Member(channel, None)  # type: ignore[arg-type]
    members._channels[name] = channel
    members.state.join(name, LIMITS)
    return channel


def client_of(config: FleetConfig = CONFIG) -> FleetClient:
    """Return what a gateway's server asks, as if it ran. It has no replicas."""
    plan: Any = SimpleNamespace(max_model_len=100)
    client = FleetClient(config, None, plan, None, None)
    client._state = "running"
    return client


class Gateway:
    """A gateway to replicas r0, r1, ... ``before``: awaited before one gets a call, with what it is to do."""

    says = False
    """Whether a replica says what it has in memory after each call."""

    def __init__(self, one: Any, before: Any = None, *others: Any, config: FleetConfig = CONFIG) -> None:
        self.replicas = {f"r{number}": each for number, each in enumerate((one, *others))}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """What replicas were to do, and with which arguments."""

        async def call(action: str, arguments: dict[str, Any], to: str) -> Any:
            self.asked.append((action, arguments))
            if before is not None:
                await before(action)
            answer = await self.replicas[to].adapter(action, dict(arguments))
            if self.says:
                self.hear(to)
            return answer

        def remote(action: str, arguments: dict[str, Any], to: str) -> asyncio.Future[Any]:
            # As with Ray it goes on when its caller does not wait for it any more.
            return asyncio.shield(asyncio.ensure_future(call(action, arguments, to)))

        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
        self.members = Members(config, handle, gateway=f"gateway-{id(self)}")
        self.adapters = FleetAdapters(config, self.members)
        for name in self.replicas:
            join(self.members, name)

    async def load(self, name: str, path: str = "", *, replace: bool = False) -> AdapterInfo:
        return await self.adapters.load_adapter(name, path or name, pin=False, replace=replace)

    def hear(self, name: str) -> None:
        """The replica says what it has in memory."""
        member = self.members.members[name]
        before, member.residency = member.residency, self.replicas[name].engine.residency()
        for listener in self.members.on_residency:
            listener(member, before)

    async def joins(self, name: str = "r0") -> None:
        """The replica is new, or back: as after the loss of this gateway's channel to it."""
        if name not in self.members.members:
            join(self.members, name)
        for listener in self.members.on_join:
            listener(self.members.members[name])
        while not self.members.members[name].ready:
            await asyncio.sleep(0.01)
