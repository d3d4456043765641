"""Replicas that do nothing but report, and a gateway to them; for virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from support.fleet_here import Stream, serve_names

from aioengine import EngineConfig
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.wire import ChannelName, Frame, Hello, Status, decode_orders, encode_frame
from aioengine.schedulers.routing import Report

CONFIG = FleetConfig(engine=EngineConfig(model="tiny"), replicas=3)
NAMES = ("r0", "r1", "r2")
EVER = 1e9
HANDS_OVER = 0.01
"""Seconds from a frame's arrival, which Ray's threads see, to the gateway's task that reads it."""


class Replicas:
    """Serve's handle of replicas that report at intervals, until they are ``silent`` or one of them ``dies``.
    Orders take ``on_the_way`` seconds to the one that is ``far``."""

    def __init__(
        self,
        *,
        silent: Mapping[str, float] = {},
        dies: Mapping[str, float] = {},
        far: str = "",
        on_the_way: float = 0.0,
    ) -> None:
        self._silent = silent
        self._dies = dies
        self._far = far
        self._on_the_way = on_the_way
        self._received: dict[str, int] = {}
        self.opened: list[str] = []

    def options(self, method_name: str, **_: Any) -> Any:
        call = {"channel": self._channel, "submit": self._submit}.get(method_name, self._any)
        return SimpleNamespace(remote=call)

    async def _any(self, *_: Any, **__: Any) -> None:
        pass

    def _channel(self, _name: ChannelName, to: str) -> Any:
        self.opened.append(to)
        return Stream(self._frames(to))

    async def _submit(self, _name: ChannelName, orders: bytes, to: str) -> None:
        await asyncio.sleep(self._on_the_way if to == self._far else 0.0)
        self._received[to] += len(decode_orders(orders))

    async def _frames(self, replica: str) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        self._received[replica] = 0
        hello: Hello | None = Hello(replica, 1, "node", 1, 1, 1, 1)
        sent, dies = loop.time(), self._dies.get(replica, EVER)
        while sent < min(self._silent.get(replica, EVER), dies):
            await asyncio.sleep(sent - loop.time())  # what was sent while the gateway stood still is there
            await asyncio.sleep(HANDS_OVER)
            report = Report(sent, self._received[replica], 0, 0, 0, 0, 1, {})
            status = Status(report, step_age=0.0, draining=False, state="running")
            yield encode_frame(Frame(hello=hello, status=status))
            hello = None
            sent += CONFIG.heartbeat_seconds
        await asyncio.sleep(dies - loop.time())
        raise LookupError(f"replica {replica} is gone")


@asynccontextmanager
async def gateway_of(replicas: Replicas, config: FleetConfig = CONFIG) -> AsyncIterator[Members]:
    """What a gateway knows of them, once all have joined."""
    with pytest.MonkeyPatch.context() as patch:
        serve_names(set(NAMES), patch)
        members = Members(config, replicas, gateway="gateway")
        members.start()
        await members.complete(10.0)
        yield members
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]
