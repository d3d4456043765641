"""A replica of a simulated fleet: the one that serves, with a simulated engine, and its link to the
gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Any, cast

from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.outbox import Outbox
from aioengine.fleet.replica import EngineReplica
from aioengine.fleet.wire import ChannelName, Frame, Status, decode_frame, encode_frame
from aioengine.lab.fleet.conditions import Conditions
from aioengine.lab.simulation.engine import SimulatedEngine


class SimulatedReplica(EngineReplica):
    """Replica number ``index``. Nobody else ends it: :meth:`stop` has to be awaited."""

    engine: SimulatedEngine

    def __init__(
        self, index: int, name: str, make_engine: Callable[[], SimulatedEngine], conditions: Conditions
    ) -> None:
        self.index = index
        self.name = name
        self.link = Link(self, conditions)
        self._make_engine = make_engine
        self._skew = conditions.skew.get(index, 0.0)

    async def start(self, config: FleetConfig) -> None:
        await self.begin(config, self.name)

    async def start_engine(self) -> AsyncEngine:
        engine = self._make_engine()
        await engine.start()
        return engine

    async def deliver(self) -> None:
        """Send the gateway all tokens up to now, which it would have had one by one."""
        self.engine.flush()
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def _status(self, box: Outbox, now: float) -> Status:
        return super()._status(box, now + self._skew)

    def __del__(self) -> None:  # type: ignore[override] # Serve would await it
        pass


TURNS = 8
"""Turns of the event loop that tokens take from an engine to the link."""


class Link:
    """The way between the gateway and a replica. What is sent while it is cut arrives when it is healed."""

    def __init__(self, replica: SimulatedReplica, conditions: Conditions) -> None:
        self._replica = replica
        self._conditions = conditions
        self._open = asyncio.Event()
        self._open.set()
        self._noticed = asyncio.Event()
        """Set when the gateway's machine notices that the replica is dead."""
        self._dead = asyncio.Event()

    async def cut(self) -> None:
        await self._replica.deliver()
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    async def kill(self) -> None:
        """Deliver what was sent, and nothing more."""
        if self._open.is_set():
            await self._replica.deliver()
        self._dead.set()
        asyncio.get_running_loop().call_later(self._conditions.detect_seconds, self._noticed.set)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the replica. Raises ConnectionError if it is dead."""
        await asyncio.sleep(self._conditions.delay)
        await self._open.wait()
        if self._dead.is_set():
            await self._noticed.wait()
            raise ConnectionError("the replica is dead")
        return await getattr(self._replica, method)(*arguments)

    def stream(self, channel: ChannelName) -> Stream:
        return Stream(self, channel)

    async def frames(self, channel: ChannelName, arrive: Callable[[bytes | None], None]) -> None:
        """Have the replica's frames arrive, each after its time on the way, and None when it is found to be
        dead."""
        loop, delay = asyncio.get_running_loop(), self._conditions.delay
        await asyncio.sleep(delay)
        await self._open.wait()
        if not self._dead.is_set():
            frames = cast("AsyncGenerator[bytes, None]", self._replica.channel(channel))
            async with aclosing(frames):
                async for data in frames:
                    if self._dead.is_set():
                        break
                    for seconds, part in self._parts(data):
                        loop.call_later(delay + seconds, arrive, part)
        await self._noticed.wait()
        arrive(None)

    def _parts(self, data: bytes) -> list[tuple[float, bytes]]:
        """Return the parts of a frame that take different times, with what these are longer."""
        late = self._conditions.report_delay
        if not late:
            return [(0.0, data)]
        frame = decode_frame(data)
        first = encode_frame(Frame(frame.deltas, hello=frame.hello))
        return [(0.0, first), (late, encode_frame(Frame([], frame.status, frame.residency)))]

    async def opened(self) -> None:
        await self._open.wait()


class Stream:
    """What Serve gives for a method that yields: frames, until the replica is dead."""

    def __init__(self, link: Link, channel: ChannelName) -> None:
        self._link = link
        self._arrived: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(link.frames(channel, self._arrived.put_nowait))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            data = await self._arrived.get()
            if data is None:
                raise ConnectionError("the replica is dead")
            await self._link.opened()
            yield data

    def cancel(self) -> None:
        """Stop listening. The replica hears of it when the link is open."""
        task = asyncio.get_running_loop().create_task(self._hang_up(), name="aioengine-lab-hang-up")
        self._task.add_done_callback(lambda _: task.done())  # it holds the task until then

    async def _hang_up(self) -> None:
        await self._link.opened()
        self._task.cancel()


class Handle:
    """What Serve's handle of a deployment does, for ``replicas`` by name."""

    def __init__(self, replicas: dict[str, SimulatedReplica]) -> None:
        self._replicas = replicas

    def options(self, *, method_name: str, stream: bool = False) -> Any:
        def remote(*arguments: Any, to: str | None = None) -> Any:
            if to is None:
                return asyncio.sleep(0)  # a sign that there are requests
            link = self._replicas[to].link
            return link.stream(*arguments) if stream else link.call(method_name, *arguments)

        return SimpleNamespace(remote=remote)


async def ask(replica: SimulatedReplica, action: str, adapter: str) -> None:
    """Have a replica carry out a step of a plan. A plan is a wish: failures do not count."""
    with suppress(AioEngineError, ConnectionError):
        await replica.link.call("adapter", action, {"name": adapter})
