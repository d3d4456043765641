"""An engine that records the time of every step and every adapter move."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from aioengine import events
from aioengine.engine import AsyncEngine
from aioengine.errors import EngineDead
from aioengine.executors.base import Device, Ended
from aioengine.info import LoadProgress
from aioengine.lab.calibration.processor_waits import Waits
from aioengine.lab.costs.steps import StepShape, step_shape
from aioengine.runtime.assemble import Built
from aioengine.step import LoadedAdapter, ReadOrder, StepBatch, StepResult


class ProbedStep(NamedTuple):
    """A step, with times of ``time.monotonic``. The next step began at ``until``."""

    shape: StepShape
    start: float
    until: float
    seconds: float
    """Seconds on the device; the rest until ``until`` is the engine's."""

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
    """Recorder of steps and moves. ``steps`` are those that another followed at once, ``moves`` those that
    succeeded."""

    def __init__(self) -> None:
        self.steps: list[ProbedStep] = []
        self.moves: list[ProbedMove] = []
        self.waits = Waits()
        """Counts while no adapter is moved: the threads that read and copy take processors from the steps,
        which is no other program's doing."""
        self._grown = asyncio.Event()
        self._last: tuple[StepShape, float, float] | None = None
        self._open: dict[tuple[str, str, int], float] = {}
        """Begin of each move under way, by stage, adapter and version."""

    def begins(self, now: float) -> None:
        """Note that a step begins."""
        if self._last is not None:
            shape, start, seconds = self._last
            self.steps.append(ProbedStep(shape, start, now, seconds))
            self._last = None
            self._grown.set()

    def ended(self, batch: StepBatch, start: float, seconds: float) -> None:
        self._last = (step_shape(batch), start, seconds)

    def pause(self) -> None:
        """Note a pause: the next step does not follow the last one at once."""
        self._last = None

    async def grow(self, count: int) -> None:
        """Wait until this many more steps have been recorded."""
        until = len(self.steps) + count
        while len(self.steps) < until:
            self._grown.clear()
            await self._grown.wait()

    def handle(self, event: events.Event) -> None:
        """Listen to the engine's events."""
        match event:
            case events.AdapterLoading():
                self._open["disk", event.adapter, event.version] = event.time
            case events.AdapterPlacing():
                self._open["slot", event.adapter, event.version] = event.time
            case events.AdapterLoaded():
                self._moved("disk", event)
            case events.AdapterPlaced():
                self._moved("slot", event)
            case events.AdapterFailed() | events.AdapterUnloaded():  # the latter also ends a cancelled move
                for stage in ("disk", "slot"):
                    self._open.pop((stage, event.adapter, event.version), None)
            case events.EngineRestarted():
                self._open.clear()
            case _:
                return
        if self._open:
            self.waits.pause()
        else:
            self.waits.go_on()

    def _moved(self, stage: str, event: events.AdapterLoaded | events.AdapterPlaced) -> None:
        start = self._open.pop((stage, event.adapter, event.version), None)
        if start is not None:
            self.moves.append(ProbedMove(stage, start, event.time, event.nbytes))


class ProbedEngine(AsyncEngine):
    """The live engine with a probe between it and its device."""

    async def _build(self, work: ThreadPoolExecutor, progress: LoadProgress | None) -> Built:
        built = await super()._build(work, progress)
        self.probe = Probe()
        self.device = built.device
        return built._replace(device=_ProbedDevice(built.device, self.probe))

    async def start(self, *, progress: LoadProgress | None = None) -> None:
        await super().start(progress=progress)
        self.add_listener(self.probe.handle)


class _ProbedDevice(Device):
    def __init__(self, device: Device, probe: Probe) -> None:
        self.can_restart = device.can_restart
        self._device = device
        self._probe = probe

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        # Not uvloop's time: it is in whole milliseconds, which are longer than what is between two steps.
        start = time.monotonic()

        def noted(result: StepResult | Exception) -> None:
            if not isinstance(result, Exception):
                self._probe.ended(batch, start, result.seconds[0])
            ended(result)

        self._probe.begins(start)
        self._device.begin(batch, noted)

    async def load(self, order: ReadOrder) -> LoadedAdapter:
        return await self._device.load(order)

    async def place(self, uid: int, slot: int, offset: int) -> float:
        return await self._device.place(uid, slot, offset)

    def drop(self, uid: int) -> None:
        self._device.drop(uid)

    def forget(self, request_id: str) -> None:
        self._device.forget(request_id)

    def watch(self, lost: Callable[[EngineDead], None]) -> None:
        self._device.watch(lost)

    async def restart(self) -> None:
        await self._device.restart()

    async def close(self) -> None:
        await self._device.close()
