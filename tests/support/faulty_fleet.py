"""A simulated fleet to which things happen: late messages, partitions, deaths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, NamedTuple, Self, cast

from support.lab_sim import MemorySink, config, costs

from aioengine.fleet.config import FleetConfig
from aioengine.fleet.wire import ChannelName, Frame, decode_frame, encode_frame
from aioengine.lab.costs.model import CostModel
from aioengine.lab.fleet.fleet import START_SECONDS, SimulatedFleet
from aioengine.lab.fleet.replica import SimulatedReplica, Stream
from aioengine.lab.runs.replay import replay_on_fleet
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import Workload
from aioengine.tasks import Background


class Fault(NamedTuple):
    """A replica is killed, started again with empty caches, cut off from the gateway or reachable again, or
    drained."""

    time: float
    """Seconds from the start of the run."""
    kind: Literal["kill", "start", "cut", "heal", "drain"]
    replica: int


class Conditions(NamedTuple):
    delay: float = 0.001
    report_delay: float = 0.0
    """Additional seconds that reports take, so that knowledge is old when it arrives."""
    detect_seconds: float = 0.05
    """From a replica's death until the gateway knows of it."""
    skew: Mapping[int, float] = {}
    """Seconds by which each replica's clock differs from the gateway's, by index."""
    scale_seconds: float = 1.0
    start_seconds: float = 30.0
    faults: Sequence[Fault] = ()


class FaultyReplica(SimulatedReplica):
    """What is sent while it is cut off arrives when that is healed."""

    def __init__(
        self, index: int, name: str, make_engine: Callable[[], SimulatedEngine], conditions: Conditions
    ) -> None:
        super().__init__(index, name, make_engine, conditions.delay)
        self.conditions = conditions
        self.open = asyncio.Event()
        self.open.set()
        self.dead = False
        self.noticed = asyncio.Event()
        """The gateway's machine has noticed that it is dead."""

    def kill(self) -> None:
        """Deliver what was sent, and nothing more."""
        self.dead = True
        asyncio.get_running_loop().call_later(self.conditions.detect_seconds, self.noticed.set)

    async def call(self, method: str, *arguments: Any) -> Any:
        await asyncio.sleep(self.delay)
        await self.open.wait()
        if self.dead:
            await self.noticed.wait()
            raise ConnectionError("the replica is dead")
        return await getattr(self, method)(*arguments)

    def stream(self, channel: ChannelName) -> Stream:
        return FaultyStream(self, channel)

    async def frames(self, channel: ChannelName, arrive: Callable[[bytes], None]) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.delay)
        await self.open.wait()
        if not self.dead:
            frames = cast("AsyncGenerator[bytes, None]", self.channel(channel))
            async with aclosing(frames):
                async for data in frames:
                    if self.dead:
                        break
                    for seconds, part in self._parts(data):
                        loop.call_later(self.delay + seconds, arrive, part)
        await self.noticed.wait()
        arrive(b"")

    def _parts(self, data: bytes) -> list[tuple[float, bytes]]:
        """The parts of a frame that take different times, with what these are longer."""
        late, skew = self.conditions.report_delay, self.conditions.skew.get(self.index, 0.0)
        frame = decode_frame(data)
        if frame.status is None or not (late or skew):
            return [(0.0, data)]
        report = frame.status.report
        frame.status.report = report._replace(sent_at=report.sent_at + skew)
        rest = encode_frame(Frame([], frame.status, frame.residency))
        return [(0.0, encode_frame(Frame(frame.deltas, hello=frame.hello))), (late, rest)]


class FaultyStream(Stream):
    """Frames until the replica is dead, which an empty one says."""

    def __init__(self, replica: FaultyReplica, channel: ChannelName) -> None:
        self.replica = replica
        super().__init__(replica, channel)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in super().__aiter__():
            if not data:
                raise ConnectionError("the replica is dead")
            await self.replica.open.wait()
            yield data

    def cancel(self) -> None:
        """The replica hears of it when it can be reached."""
        self.hanging_up = asyncio.get_running_loop().create_task(self._hang_up())

    async def _hang_up(self) -> None:
        await self.replica.open.wait()
        super().cancel()


class FaultyFleet(SimulatedFleet):
    """A fleet under ``conditions``."""

    def __init__(
        self,
        config: FleetConfig,
        make_engine: Callable[[], SimulatedEngine],
        conditions: Conditions,
        **options: Any,
    ) -> None:
        super().__init__(config, make_engine, start_seconds=conditions.start_seconds, **options)
        self.conditions = conditions
        self.delay, self.scale_seconds = conditions.delay, conditions.scale_seconds
        self.disturbing = Background()

    async def __aenter__(self) -> Self:
        self.disturbing.spawn(self.disturb())
        return await super().__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        await self.disturbing.end()
        await super().__aexit__(*exc)

    def make_replica(self, index: int, name: str) -> SimulatedReplica:
        return FaultyReplica(index, name, self.make_engine, self.conditions)

    async def disturb(self) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time() + START_SECONDS
        for fault in sorted(self.conditions.faults):
            await asyncio.sleep(max(start + fault.time - loop.time(), 0.0))
            replica = self.living.get(fault.replica)
            if fault.kind == "start":
                await self.start_replica(fault.replica)
            elif isinstance(replica, FaultyReplica):
                await self.happen(fault.kind, replica)

    async def happen(self, kind: str, replica: FaultyReplica) -> None:
        if kind == "kill":
            replica.kill()
            await self.stop_replica(replica)
            asyncio.get_running_loop().call_later(self.conditions.detect_seconds, self.tell_replicas)
        elif kind == "cut":
            replica.open.clear()
        elif kind == "heal":
            replica.open.set()
        else:
            await replica.drain()


def play_fleet(
    workload: Workload,
    conditions: Conditions | None = None,
    *,
    model: CostModel | None = None,
    max_num_seqs: int = 64,
    **fields: Any,
) -> tuple[SimulatedFleet, MemorySink]:
    """Replay in virtual time; ``fields`` are the fleet's, with those that an experiment gives it."""
    kept, conditions = MemorySink(), conditions or Conditions()
    own = {"replicas": 3, "router": "affinity", "placement": "none", "replay": False, "step_seconds": 1e9}
    own |= {"silent_seconds": 2.75, "replica_wait_seconds": 30.0 + conditions.start_seconds}
    engine = config(max_num_seqs=max_num_seqs)
    told = FleetConfig(**{"engine": engine, **own, **fields})

    def make_engine() -> SimulatedEngine:
        return SimulatedEngine(engine, model or costs())

    playing = replay_on_fleet(
        workload,
        kept,
        open_fleet=lambda watch: FaultyFleet(told, make_engine, conditions, watch=watch),
    )
    return run_in_virtual_time(playing), kept
