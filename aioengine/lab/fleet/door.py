"""SimulatedFleet: replicas in virtual time behind a door that routes with the serving code."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from aioengine.errors import AioEngineError, EngineDead, EngineOverloaded
from aioengine.lab.fleet.conditions import Conditions, Fault
from aioengine.lab.fleet.replica import ReplicaLost, SimulatedReplica
from aioengine.lab.fleet.scaling import Scaler
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.request import SamplingParams
from aioengine.runtime.output import RequestOutput
from aioengine.schedulers import routing
from aioengine.tasks import end_tasks


class SimulatedFleet:
    """Fleet of ``replicas`` simulated engines and one door, under the given :class:`Conditions`.

    >>> async with SimulatedFleet(3, make_engine, load_router("affinity"), NoPlacement()) as fleet:
    ...     await fleet.complete([0] * 100, adapter="a", request_id="r0")

    Args:
        make_engine: Makes a replica's engine; it is called again when a replica that died is started.
        watch: Called with each started engine and its replica's index, before it gets any request. Returns a
            function to call when that engine has stopped.
    """

    def __init__(
        self,
        replicas: int,
        make_engine: Callable[[], SimulatedEngine],
        router: routing.RouterPolicy,
        placement: routing.PlacementPolicy,
        conditions: Conditions | None = None,
        *,
        autoscale: routing.ScalingPolicy | None = None,
        watch: Callable[[SimulatedEngine, int], Callable[[], None]] = lambda engine, index: lambda: None,
    ) -> None:
        self.conditions = conditions or Conditions()
        self.migrations = 0
        """Requests sent to another replica after the one that had them was lost."""
        self.rejected = 0
        """Requests that the router rejected, or for which there was no replica."""
        self.by_replica = [0] * replicas
        """Requests sent to each, by index."""
        self.replicas: dict[str, SimulatedReplica] = {}
        """Live replicas by id; a restarted one gets a new id."""
        self.guard = routing.RouterGuard(router)
        self.plan_guard = routing.PlacementGuard(placement)
        self.moves: Counter[str] = Counter()
        """Steps of plans by kind."""
        self.scaler: Scaler | None = None
        self._autoscale = autoscale
        self._make_engine = make_engine
        self._watch = watch
        self._shapes: list[AdapterShape] = []
        self._lengths: dict[str, int] = {}
        self._current: dict[int, SimulatedReplica] = {}
        self._unwatch: dict[str, Callable[[], None]] = {}
        self._starting: set[int] = set()
        self._draining: set[str] = set()
        self._given_up: set[str] = set()
        self._starts: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.state = routing.FleetState(self._loop.time, silent_after=self.conditions.silent_after)
        self.state.listeners.append(self.guard.tell)
        for index in range(len(self.by_replica)):
            await self._start(index)
        self._spawn(self._check_always(), "check")
        self._spawn(self._plan_always(), "plan")
        self._spawn(self._disturb(), "faults")
        if self._autoscale is not None:
            conditions = self.conditions
            self.scaler = Scaler(
                self._autoscale,
                self,
                len(self.by_replica),
                every=conditions.scale_seconds,
                start_seconds=conditions.start_seconds,
                spawn=self._spawn,
            )
            self._spawn(self.scaler.run(), "scaler")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end_tasks(self._tasks)
        for replica in list(self._current.values()):
            await self._stop(replica, replica.close())

    # As an engine has it

    def add_adapters(self, shapes: Iterable[AdapterShape]) -> None:
        """Register adapters that have a size and no contents, with every replica."""
        shapes = list(shapes)
        self._shapes += shapes
        costs = next(iter(self._current.values())).engine.costs
        for shape in shapes:
            nbytes = costs.adapter_nbytes(shape.rank) if shape.nbytes is None else shape.nbytes
            self.state.add_adapter(shape.name, nbytes)
        for replica in self._current.values():
            replica.engine.add_adapters(shapes)

    def set_length(self, request_id: str, tokens: int) -> None:
        """Have the request's output end with its ``tokens``-th token, if it is allowed as many."""
        self._lengths[request_id] = tokens

    def forget_length(self, request_id: str) -> None:
        """Forget the length of a request that has ended."""
        self._lengths.pop(request_id, None)

    async def complete(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        adapter: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str | None = None,
        expected_tokens: int | None = None,
    ) -> RequestOutput:
        """Route the request. If its replica is lost, route it again, with the tokens that were delivered.

        Raises EngineOverloaded if it is rejected, EngineDead if its replicas were lost more often than
        ``migration_limit``, and what engines raise.
        """
        due = None if deadline is None else self._loop.time() + deadline
        request = routing.RouteRequest(
            request_id,
            adapter,
            len(prompt),
            params.max_tokens,
            expected_tokens,
            tenant,
            priority,
            due,
            routing.prefix_hashes(prompt, adapter) if self._caching else (),
        )
        delivered = 0
        while True:
            await self._until_there()
            route = self.guard.route(request, self.state.view)
            if route.reject is not None:
                self.rejected += 1
                raise EngineOverloaded(f"request {request_id!r} was not routed: {route.reject}")
            replica = self.replicas[route.replicas[0]]
            if request_id in self._lengths:
                replica.engine.set_length(request_id, self._lengths[request_id])
            self.state.sent(request, replica.replica_id)
            self.by_replica[replica.index] += 1
            attempt = replica.submit(
                prompt,
                params,
                delivered,
                adapter=adapter,
                request_id=request_id,
                priority=priority,
                deadline=None if due is None else max(due - self._loop.time(), 0.0),
                tenant=tenant,
                expected_tokens=expected_tokens,
            )
            try:
                output = await attempt.outcome
            except ReplicaLost as lost:
                request = request._replace(tried=(*request.tried, replica.replica_id))
                delivered = min(lost.delivered, params.max_tokens)
                if len(request.tried) > self.conditions.migration_limit:
                    raise EngineDead(
                        f"request {request_id!r}: {len(request.tried)} replicas were lost with it, more than "
                        f"migration_limit={self.conditions.migration_limit}"
                    ) from lost
                self.migrations += 1
            except BaseException as error:
                self.state.ended(request_id)
                if attempt.task is not None and not isinstance(error, AioEngineError):
                    attempt.task.cancel()  # its caller is gone
                raise
            else:
                self.state.ended(request_id)
                return output
            finally:
                replica.engine.forget_length(request_id)

    # Replicas

    async def add_replica(self) -> None:
        """Start one more replica, at the index of a removed one if there is one."""
        taken = self._current.keys() | self._starting
        index = next((i for i in range(len(self.by_replica)) if i not in taken), len(self.by_replica))
        if index == len(self.by_replica):
            self.by_replica.append(0)
        await self._start(index)

    @property
    def alive(self) -> int:
        """Replicas that live and do not drain."""
        return sum(replica.replica_id not in self._draining for replica in self._current.values())

    async def remove_replica(self) -> None:
        """Drain the replica with the least to do, and stop it when it has finished."""
        there = [replica for replica in self.state.view.accepting if replica.replica_id in self.replicas]
        if not there:
            return
        least = min(there, key=lambda view: (view.running + view.waiting, view.replica_id))
        replica = self.replicas[least.replica_id]
        self.state.drain(replica.replica_id)
        self._draining.add(replica.replica_id)
        while outcomes := [attempt.outcome for attempt in replica.attempts.values() if replica.alive]:
            await asyncio.wait(outcomes)
            await asyncio.sleep(0)  # what has an outcome is let go
        if replica.alive:
            del self._current[replica.index], self.replicas[replica.replica_id]
            self._given_up.discard(replica.replica_id)
            self.state.leave(replica.replica_id)
            await self._stop(replica, replica.close())

    async def _until_there(self) -> None:
        """Wait for a replica, if there is none because the fleet had no requests."""
        if self.scaler is None:
            return
        self.scaler.waiting += 1
        try:
            while not self.state.view.accepting:  # noqa: ASYNC110 - it has no event for each way of coming back
                await asyncio.sleep(self.conditions.report_seconds)
        finally:
            self.scaler.waiting -= 1

    async def _start(self, index: int) -> None:
        engine = self._make_engine()
        self._caching = engine.config.enable_prefix_caching
        self._starting.add(index)
        try:
            await engine.start()
        finally:
            self._starting.discard(index)
        engine.add_adapters(self._shapes)
        self._starts[index] += 1
        again = f"+{self._starts[index] - 1}" if self._starts[index] > 1 else ""
        replica = SimulatedReplica(
            f"replica-{index}{again}",
            index,
            engine,
            self.conditions,
            started=lambda request_id: self.state.started(request_id),
            reported=self._reported,
        )
        self._unwatch[replica.replica_id] = self._watch(engine, index)
        self._current[index] = self.replicas[replica.replica_id] = replica
        self.state.join(replica.replica_id, replica.limits)

    async def _stop(self, replica: SimulatedReplica, stopping: Any) -> None:
        await stopping
        self._unwatch.pop(replica.replica_id)()

    def _reported(self, replica_id: str, report: routing.Report) -> None:
        if replica_id in self._given_up:  # it is heard of again: what it was sent before is gone
            self._given_up.discard(replica_id)
            self.replicas[replica_id].close_channel()
            self.state.join(replica_id, self.replicas[replica_id].limits)
            if replica_id in self._draining:
                self.state.drain(replica_id)
            return  # the report counts for the channel before
        self.state.report(replica_id, report)

    def _lost(self, replica: SimulatedReplica) -> None:
        """Give the replica up, and send its requests to others."""
        self.state.leave(replica.replica_id)
        replica.close_channel()
        if replica.alive:
            self._given_up.add(replica.replica_id)
        else:
            self.replicas.pop(replica.replica_id, None)

    async def _check_always(self) -> None:
        while True:
            await asyncio.sleep(self.conditions.silent_after / 4)
            for replica_id in self.state.check():
                self._lost(self.replicas[replica_id])

    async def _plan_always(self) -> None:
        while True:
            await asyncio.sleep(self.conditions.plan_seconds)
            snapshot = self.state.snapshot()
            plan = self.plan_guard.plan(snapshot)
            if plan is None:
                self.state.not_planned(snapshot)
                continue
            self.state.planned(plan)
            for move in plan:
                if move.replica in self.replicas:
                    self.moves[move.kind] += 1
                    self.replicas[move.replica].move(move)

    async def _disturb(self) -> None:
        start = self._loop.time()
        for fault in sorted(self.conditions.faults):
            await asyncio.sleep(max(start + fault.time - self._loop.time(), 0.0))
            await self._happen(fault)

    async def _happen(self, fault: Fault) -> None:
        replica = self._current.get(fault.replica)
        if fault.kind == "start":
            if replica is None and fault.replica not in self._starting:
                await self._start(fault.replica)
        elif replica is None:
            return
        elif fault.kind == "kill":
            del self._current[fault.replica]
            await self._stop(replica, replica.kill())
            self._loop.call_later(self.conditions.detect_seconds, self._lost, replica)
        elif fault.kind == "cut":
            replica.cut()
        elif fault.kind == "heal":
            replica.heal()
        elif replica.replica_id in self.state.view.replicas:
            self.state.drain(replica.replica_id)
            self._draining.add(replica.replica_id)

    def check_invariants(self) -> None:
        """Assert the invariants of every live engine and of the door's knowledge."""
        for replica in self._current.values():
            replica.engine.check_invariants()
        known: Sequence[str] = tuple(self.state.view.replicas)
        for name, adapter in self.state.view.adapters.items():
            assert set(adapter.holders) <= set(known), f"{name} is held by a replica that has left"
        assert all(replica.waiting >= 0 and replica.running >= 0 for replica in self.state.view.accepting)

    def _spawn(self, work: Any, what: str) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work, name=f"aioengine-lab-fleet-{what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
