"""Scales a simulated fleet by the same scaling policies as a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from aioengine.schedulers.routing import FleetState, ScalingPolicy


class Scaled(NamedTuple):
    """Record of a scaling policy in a run."""

    started: int
    """Replicas added after the start."""
    stopped: int
    fewest: int
    """Smallest number of replicas that took requests at a time."""
    most: int
    replica_seconds: float
    """Sum of the seconds for which each replica existed, its start included."""


class ScalableFleet(Protocol):
    """Interface that :class:`Scaler` needs of a :class:`~aioengine.lab.fleet.door.SimulatedFleet`."""

    state: FleetState

    @property
    def alive(self) -> int:
        """Replicas that live and do not drain."""

    async def add_replica(self) -> None: ...
    async def remove_replica(self) -> None:
        """Drain the replica with the least to do, and stop it when it has finished."""


class Scaler:
    """Asks ``policy`` every ``every`` seconds; an added replica takes ``start_seconds`` to start."""

    def __init__(
        self,
        policy: ScalingPolicy,
        fleet: ScalableFleet,
        replicas: int,
        *,
        every: float,
        start_seconds: float,
        spawn: Callable[[Awaitable[None], str], None],
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._every = every
        self._start_seconds = start_seconds
        self._spawn = spawn
        self._wanted = self._fewest = self._most = replicas
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._paid = 0.0
        self._started = self._stopped = self._starting = 0
        self.waiting = 0
        """Requests for which there is no replica."""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            self._count()
            wanted = self._policy.replicas(
                self._fleet.state.view, self._wanted, waiting=self.waiting
            ).replicas
            for _ in range(self._wanted - wanted):
                self._stopped += 1
                self._spawn(self._fleet.remove_replica(), "scale")
            self._wanted = wanted
            # Those that died are replaced, as Ray Serve does it.
            for _ in range(wanted - self._fleet.alive - self._starting):
                self._started += 1
                self._starting += 1
                self._spawn(self._start(), "scale")

    def result(self) -> Scaled:
        self._count()
        return Scaled(self._started, self._stopped, self._fewest, self._most, self._paid)

    async def _start(self) -> None:
        await asyncio.sleep(self._start_seconds)
        await self._fleet.add_replica()
        self._starting -= 1

    def _count(self) -> None:
        now = self._loop.time()
        self._paid += (now - self._since) * self._wanted
        self._since = now
        there = len(self._fleet.state.view.accepting)
        self._fewest, self._most = min(self._fewest, there), max(self._most, there)
