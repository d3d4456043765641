"""An engine that writes down what every step and every adapter move took."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from aioengine import events
from aioengine.engine import AsyncEngine
from aioengine.errors import EngineDead
from aioengine.executors.base import Executor
from aioengine.info import LoadProgress
from aioengine.lab.costs.steps import StepShape, step_shape
from aioengine.runtime.assemble import Built
from aioengine.step import StepBatch, StepResult


class ProbedStep(NamedTuple):
    """Times are the event loop's. The next step began at ``until``."""

    shape: StepShape
    start: float
    until: float
    seconds: float
    """The executor's time; the rest until ``until`` is the engine's own."""

    @property
    def wall(self) -> float:
        return self.until - self.start


class ProbedMove(NamedTuple):
    stage: str
    """"disk" or "slot"."""
    start: float
    end: float
    nbytes: int


class Probe:
    """``steps`` are those that another followed at once, ``moves`` those that succeeded."""

    def __init__(self) -> None:
        self.steps: list[ProbedStep] = []
        self.moves: list[ProbedMove] = []
        self._grown = asyncio.Event()
        self._last: tuple[StepShape, float, float] | None = None
        self._open: dict[tuple[str, str, int], float] = {}
        """Moves under way: when they began, by stage, adapter and version."""

    def begins(self, now: float) -> None:
        """A step begins."""
        if self._last is not None:
            shape, start, seconds = self._last
            self.steps.append(ProbedStep(shape, start, now, seconds))
            self._last = None
            self._grown.set()

    def ended(self, batch: StepBatch, start: float, seconds: float) -> None:
        self._last = (step_shape(batch), start, seconds)

    def pause(self) -> None:
        """Nothing is asked of the engine for a while: the next step does not follow the last one."""
        self._last = None

    async def grow(self, count: int) -> None:
        """Wait for so many more steps."""
        until = len(self.steps) + count
        while len(self.steps) < until:
            self._grown.clear()
            await self._grown.wait()

    def handle(self, event: events.Event) -> None:
        """A listener for the engine's events."""
        match event:
            case events.AdapterLoading():
                self._open["disk", event.adapter, event.version] = event.time
            case events.AdapterPlacing():
                self._open["slot", event.adapter, event.version] = event.time
            case events.AdapterLoaded():
                self._moved("disk", event)
            case events.AdapterPlaced():
                self._moved("slot", event)
            case _:
                pass

    def _moved(self, stage: str, event: events.AdapterLoaded | events.AdapterPlaced) -> None:
        start = self._open.pop((stage, event.adapter, event.version), None)
        if start is not None:
            self.moves.append(ProbedMove(stage, start, event.time, event.nbytes))


class ProbedEngine(AsyncEngine):
    """The live engine with a probe between it and its executor."""

    async def _build(self, work: ThreadPoolExecutor, progress: LoadProgress | None) -> Built:
        built = await super()._build(work, progress)
        self.probe = Probe()
        self.executor = built.executor
        return built._replace(executor=_ProbedExecutor(built.executor, self.probe))

    async def start(self, *, progress: LoadProgress | None = None) -> None:
        await super().start(progress=progress)
        self.add_listener(self.probe.handle)


class _ProbedExecutor(Executor):
    def __init__(self, executor: Executor, probe: Probe) -> None:
        self.can_restart = executor.can_restart
        self._executor = executor
        self._probe = probe

    async def execute(self, batch: StepBatch) -> StepResult:
        loop = asyncio.get_running_loop()
        start = loop.time()
        self._probe.begins(start)
        result = await self._executor.execute(batch)
        self._probe.ended(batch, start, result.seconds)
        return result

    def forget(self, request_id: str) -> None:
        self._executor.forget(request_id)

    def watch(self, lost: Callable[[EngineDead], None]) -> None:
        self._executor.watch(lost)

    async def restart(self) -> None:
        await self._executor.restart()

    async def close(self) -> None:
        await self._executor.close()
