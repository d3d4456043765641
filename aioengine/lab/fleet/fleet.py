"""SimulatedFleet: the gateway that serves, in front of replicas in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple, Self, Unpack

from aioengine.errors import AioEngineError, EngineOverloaded, EngineStopped
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.lab.costs.model import CostModel
from aioengine.lab.fleet.replica import Handle, SimulatedReplica, ask
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.request import RequestKeywords, RequestOptions, SamplingParams
from aioengine.runtime.output import RequestOutput
from aioengine.schedulers import routing
from aioengine.tasks import Background

Watch = Callable[[SimulatedEngine, int], Callable[[float], None]]
START_SECONDS = 1.0
"""Seconds from a fleet's start, in which its replicas report for the first time, to the start of its run."""
DELAY = 0.001
"""Seconds that a message takes, each way, on one network."""


class Scaled(NamedTuple):
    """Record of a scaling policy in a run."""

    started: int = 0
    """Replicas added after the start."""
    stopped: int = 0
    replica_seconds: float = 0.0
    """Sum of the seconds for which each replica existed, its start included."""


class SimulatedFleet:
    """Fleet of simulated engines behind one gateway.

    >>> async with SimulatedFleet(FleetConfig(engine=config, replicas=3), make_engine) as fleet:
    ...     await fleet.complete([0] * 100, SamplingParams(), adapter="a", request_id="r0")

    Args:
        make_engine: Makes a replica's engine.
        start_seconds: Seconds from the decision to add a replica until it takes requests, because its model
            must be read first.
        watch: Called with each started engine and its replica's index, before it gets any request. Returns a
            function to call when that engine has stopped, with the time.
    """

    def __init__(
        self,
        config: FleetConfig,
        make_engine: Callable[[], SimulatedEngine],
        *,
        start_seconds: float = 30.0,
        watch: Watch = lambda engine, index: lambda now: None,
    ) -> None:
        self.config = config
        self.delay = DELAY
        self.scale_seconds = 1.0
        """Seconds between two decisions of the scaling policy."""
        self.rejected = 0
        """Requests that the router rejected, or for which there was no replica."""
        self.by_replica = [0] * config.replicas
        """Requests sent to each, by index."""
        self.moves: Counter[str] = Counter()
        """Steps of plans by kind."""
        self.lengths: dict[str, int] = {}
        """Length of each request's output that has not ended; see :class:`SimulatedDevice`."""
        self.scaled: Scaled | None = None
        """What the scaling policy did; None without one."""
        self._plans = routing.PlacementGuard(routing.load_placement(config.placement))
        self.make_engine = make_engine
        self._start_seconds = start_seconds
        self._watch = watch
        self._shapes: list[AdapterShape] = []
        self._replicas: dict[str, SimulatedReplica] = {}
        """All that were ever started, by name; one that is started again has another name."""
        self.living: dict[int, SimulatedReplica] = {}
        """Those that live, by index."""
        self._starting: set[int] = set()
        self._starts: Counter[int] = Counter()
        self._draining: set[str] = set()
        self._unwatch: dict[str, Callable[[float], None]] = {}
        self._tell: Callable[[set[str]], None] = lambda ids: None
        self._background = Background()
        self._calls = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        time = self._loop.time
        self.members = Members(self.config, Handle(self._replicas), gateway="lab", clock=time)
        self.dispatcher = Dispatcher(self.members, timer=time, processor=time)
        # Every replica reads the same: a version is one content.
        self.dispatcher.digest_of = lambda name: name
        self.dispatcher.on_route = self._routed
        self.members.start(self._watch_replicas)
        for index in range(self.config.replicas):
            await self.start_replica(index)
        while len(self.members.members) < self.config.replicas:
            await self.members.change()
        self._background.spawn(self._plan_always())
        if self.config.autoscale is not None:
            self._background.spawn(self._scale(routing.load_autoscaler(self.config.autoscale)))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._background.end()
        await self.members.stop(EngineStopped("the fleet was stopped"))
        for replica in list(self.living.values()):
            await self.stop_replica(replica)

    @property
    def costs(self) -> CostModel:
        """The engines' cost model."""
        return next(iter(self.living.values())).engine.costs

    @property
    def state(self) -> routing.FleetState:
        """The gateway's knowledge of the replicas."""
        return self.members.state

    @property
    def migrations(self) -> int:
        """Requests that continued on another replica."""
        return sum(self.dispatcher.migrations.values())

    @property
    def failures(self) -> dict[str, int]:
        """Failures of the router and of the placement policy, by kind."""
        return dict(self.dispatcher.guard.failures + self._plans.failures)

    def summary(self) -> dict[str, Any]:
        """Return the part ``fleet`` of a run's summary."""
        found = {
            **{name: getattr(self.config, name) for name in ("replicas", "router", "placement")},
            "requests_by_replica": self.by_replica,
            **{name: getattr(self, name) for name in ("migrations", "rejected", "failures")},
            "moves": dict(self.moves),
        }
        if self.scaled is not None:
            found["autoscale"] = {"policy": self.config.autoscale, **self.scaled._asdict()}
        return found

    # As an engine has it

    def add_adapters(self, shapes: Iterable[AdapterShape]) -> None:
        """Register adapters that have a size and no contents, with every replica."""
        shapes = list(shapes)
        self._shapes += shapes
        for shape in shapes:
            nbytes = self.costs.adapter_nbytes(shape.rank) if shape.nbytes is None else shape.nbytes
            self.state.add_adapter(shape.name, nbytes)
        for replica in self.living.values():
            replica.engine.add_adapters(shapes)

    async def complete(
        self,
        prompt: list[int],
        params: SamplingParams,
        **keywords: Unpack[RequestKeywords],
    ) -> RequestOutput:
        """Send a request through the gateway, and wait for its end. ``keywords`` are as in
        ``AsyncEngine.complete``. Raises EngineOverloaded if the router rejects it, EngineStopped if there is
        no replica, EngineDead if its replicas were lost too often, and what engines raise."""
        options = RequestOptions(**keywords)
        self._calls += 1
        name = options.request_id or f"request-{self._calls}"
        call = Call(self._calls, name, prompt, params, options, self._loop.time())
        placed = False
        try:
            await self.dispatcher.place(call)
            placed = True
            while not (output := await call.next()).finished:
                pass
            return output
        except (EngineStopped, EngineOverloaded) as error:
            self.rejected += isinstance(error, EngineStopped) or not placed
            raise
        finally:
            self.dispatcher.abandon(call)

    def check_invariants(self) -> None:
        """Assert the invariants of every live engine and of the gateway's knowledge."""
        for replica in self.living.values():
            replica.engine.check_invariants()
        known = set(self.state.view.replicas)
        for name, adapter in self.state.view.adapters.items():
            assert set(adapter.holders) <= known, f"{name} is held by a replica that has left"
        assert all(replica.waiting >= 0 and replica.running >= 0 for replica in self.state.view.accepting)

    # Replicas

    def make_replica(self, index: int, name: str) -> SimulatedReplica:
        """Make a replica, which is started then."""
        return SimulatedReplica(index, name, self.make_engine, self.delay)

    async def start_replica(self, index: int) -> None:
        """Start a replica with empty caches, unless there is one of this index, or one is being started."""
        if index in self.living or index in self._starting:
            return
        again = f"+{self._starts[index]}" if self._starts[index] else ""
        self._starts[index] += 1
        replica = self.make_replica(index, f"replica-{index:04}{again}")
        self._starting.add(index)
        try:
            await replica.start(self.config)
        finally:
            self._starting.discard(index)
        replica.engine.use_lengths(self.lengths)
        replica.engine.add_adapters(self._shapes)
        self._unwatch[replica.name] = self._watch(replica.engine, index)
        self.living[index] = self._replicas[replica.name] = replica
        self.tell_replicas()

    async def stop_replica(self, replica: SimulatedReplica) -> None:
        del self.living[replica.index]
        await replica.stop()
        self._unwatch.pop(replica.name)(self._loop.time())

    def _watch_replicas(self, application: str, told: Callable[[set[str]], None]) -> Callable[[], None]:
        self._tell = told
        return lambda: None

    def tell_replicas(self) -> None:
        """Tell the gateway which replicas there are, as Serve does."""
        self._tell({replica.name for replica in self.living.values()} - self._draining)

    def _routed(self, seconds: float, route: routing.Route) -> None:
        for replica in route.replicas[:1]:
            self.by_replica[self._replicas[replica].index] += 1

    async def _plan_always(self) -> None:
        while True:
            await asyncio.sleep(self.config.placement_seconds)
            snapshot = self.state.snapshot()
            plan = self._plans.plan(snapshot)
            if plan is None:
                continue
            self.state.planned(snapshot, plan)
            for move in sorted(plan):
                self.moves[move.kind] += 1
                if move.kind != "unload":  # the cache first drops adapters that are not used
                    self._background.spawn(ask(self._replicas[move.replica], move.kind, move.adapter))

    # Scaling, as Serve does it

    async def _scale(self, policy: routing.WaitingWork) -> None:
        """Ask a scaling policy for the number of replicas at regular times."""
        wanted, since = self.config.replicas, self._loop.time()
        self._adding, self.scaled = 0, Scaled()
        while True:
            await asyncio.sleep(self.scale_seconds)
            done, now = self.scaled, self._loop.time()
            alive = sum(replica.name not in self._draining for replica in self.living.values())
            waiting = 0 if alive else self.dispatcher.waiting
            before, wanted = wanted, policy.replicas(self.state.view, wanted, waiting=waiting).replicas
            # Those that died are replaced, too.
            fewer, more = max(before - wanted, 0), max(wanted - alive - self._adding, 0)
            seconds = done.replica_seconds + (now - since) * before
            self.scaled, since = Scaled(done.started + more, done.stopped + fewer, seconds), now
            self._adding += more
            for work in [self._remove_replica] * fewer + [self._add_replica] * more:
                self._background.spawn(work())

    async def _add_replica(self) -> None:
        """Start one more replica, at the index of a removed one if there is one."""
        await asyncio.sleep(self._start_seconds)
        taken = self.living.keys() | self._starting
        index = next((i for i in range(len(self.by_replica)) if i not in taken), len(self.by_replica))
        if index == len(self.by_replica):
            self.by_replica.append(0)
        with suppress(AioEngineError):
            await self.start_replica(index)
        self._adding -= 1

    async def _remove_replica(self) -> None:
        """Drain the replica with the least to do, and stop it when it has finished."""
        living = {replica.name: replica for replica in self.living.values()}
        there = [view for view in self.state.view.accepting if view.replica_id in living]
        if not there:
            return
        least = min(there, key=lambda view: (view.running + view.waiting, view.replica_id))
        replica = living[least.replica_id]
        self._draining.add(replica.name)
        self.tell_replicas()
        while self.members.channel(replica.name) is not None:
            await self.members.change()
        if self.living.get(replica.index) is replica:
            await self.stop_replica(replica)
