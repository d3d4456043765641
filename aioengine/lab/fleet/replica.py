"""A replica of a simulated fleet: the one that serves, with a simulated engine, and its way to a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Any, cast

from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.replica import EngineReplica
from aioengine.fleet.wire import ChannelName
from aioengine.lab.simulation.engine import SimulatedEngine


class SimulatedReplica(EngineReplica):
    """Replica number ``index``; a message takes ``delay`` seconds, each way. Nobody else ends it:
    :meth:`stop` has to be awaited."""

    engine: SimulatedEngine

    def __init__(
        self, index: int, name: str, make_engine: Callable[[], SimulatedEngine], delay: float
    ) -> None:
        self.index = index
        self.name = name
        self.delay = delay
        self._make_engine = make_engine

    async def start(self, config: FleetConfig) -> None:
        await self.begin(config, self.name)

    async def start_engine(self) -> AsyncEngine:
        engine = self._make_engine()
        await engine.start()
        return engine

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method from the gateway."""
        await asyncio.sleep(self.delay)
        return await getattr(self, method)(*arguments)

    def stream(self, channel: ChannelName) -> Stream:
        """Open a gateway's channel."""
        return Stream(self, channel)

    async def frames(self, channel: ChannelName, arrive: Callable[[bytes], None]) -> None:
        """Have the channel's frames arrive, each after its time on the way."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.delay)
        frames = cast("AsyncGenerator[bytes, None]", self.channel(channel))
        async with aclosing(frames):
            async for data in frames:
                loop.call_later(self.delay, arrive, data)

    def __del__(self) -> None:  # type: ignore[override] # Serve would await it
        pass


class Stream:
    """What Serve gives for a method that yields: frames, without end."""

    def __init__(self, replica: SimulatedReplica, channel: ChannelName) -> None:
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(replica.frames(channel, self._arrived.put_nowait))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield await self._arrived.get()

    def cancel(self) -> None:
        """Stop listening."""
        self._task.cancel()


class Handle:
    """What Serve's handle of a deployment does, for ``replicas`` by name."""

    def __init__(self, replicas: dict[str, SimulatedReplica]) -> None:
        self._replicas = replicas

    def options(self, *, method_name: str, stream: bool = False) -> Any:
        def remote(*arguments: Any, to: str | None = None) -> Any:
            if to is None:
                return asyncio.sleep(0)  # a sign that there are requests
            replica = self._replicas[to]
            return replica.stream(*arguments) if stream else replica.call(method_name, *arguments)

        return SimpleNamespace(remote=remote)


async def ask(replica: SimulatedReplica, action: str, adapter: str) -> None:
    """Have a replica carry out a step of a plan. A plan is a wish: failures do not count."""
    with suppress(AioEngineError, ConnectionError):
        await replica.call("adapter", action, {"name": adapter})
