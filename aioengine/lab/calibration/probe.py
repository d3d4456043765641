"""An engine that records the time of every step and every adapter move, and what others took of the
processors meanwhile."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from aioengine import events
from aioengine.engine import AsyncEngine
from aioengine.executors.base import Device, Ended
from aioengine.info import LoadProgress
from aioengine.lab.costs.steps import StepShape, step_shape
from aioengine.runtime.assemble import Built
from aioengine.step import StepBatch, StepResult

CALM = 0.02
"""A timing counts if the threads waited for a processor for at most this share of it."""
DISTURBED = 0.05
"""Limit of this share for steps in serving, where the engine's own threads also wait for each other."""


class Waits:
    """Counts the time that this process's threads were ready to run but had no processor, from its
    construction on, except during pauses. Linux measures it; elsewhere it is 0."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = _waited()
        """What had been waited when the last pause ended; None during one."""

    def pause(self) -> None:
        self._before, self._since = self.seconds(), None

    def go_on(self) -> None:
        if self._since is None:
            self._since = _waited()

    def seconds(self) -> float:
        """Return the sum over all threads, in seconds."""
        now = 0.0 if self._since is None else max(_waited() - self._since, 0.0)  # less if a thread has ended
        return self._before + now


def _waited() -> float:
    nanoseconds = 0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):  # it has ended, or there are no such statistics
            nanoseconds += int(statistics.read_text(encoding="ascii").split()[1])
    return nanoseconds * 1e-9


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
            case events.AdapterLoading() | events.AdapterPlacing():
                self._open[_move(event)] = event.time
            case events.AdapterLoaded() | events.AdapterPlaced():
                start = self._open.pop(_move(event), None)
                if start is not None:
                    self.moves.append(ProbedMove(_move(event)[0], start, event.time, event.nbytes))
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


def _move(event: events.AdapterEvent) -> tuple[str, str, int]:
    """Return stage, adapter and version of a move."""
    stage = "disk" if isinstance(event, events.AdapterLoading | events.AdapterLoaded) else "slot"
    return stage, event.adapter, event.version


class ProbedEngine(AsyncEngine):
    """The live engine with a probe between it and its device."""

    async def _build(self, work: ThreadPoolExecutor, progress: LoadProgress | None) -> Built:
        built = await super()._build(work, progress)
        self.probe = Probe()
        self.device = built.device
        return built._replace(device=cast(Device, _ProbedDevice(built.device, self.probe)))

    async def start(self, *, progress: LoadProgress | None = None) -> None:
        await super().start(progress=progress)
        self.add_listener(self.probe.handle)


class _ProbedDevice:
    """Device whose steps are recorded."""

    def __init__(self, device: Device, probe: Probe) -> None:
        self._device = device
        self._probe = probe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        # Not uvloop's time: it is in whole milliseconds, which are longer than what is between two steps.
        start = time.monotonic()

        def noted(result: StepResult | Exception) -> None:
            if not isinstance(result, Exception):
                self._probe.ended(batch, start, result.seconds[0])
            ended(result)

        self._probe.begins(start)
        self._device.begin(batch, noted)
