"""An engine that records the time of every step and every adapter move."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

from aioengine import events
from aioengine.engine import AsyncEngine
from aioengine.executors.base import Device, Ended
from aioengine.info import LoadProgress
from aioengine.lab.costs.steps import StepShape, step_shape
from aioengine.runtime.assemble import Built
from aioengine.step import StepBatch, StepResult

IDLE_SECONDS = 0.02
"""A step that begins later after the one before does not follow it: the engine had nothing to do."""


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
    """Recorder of steps and moves. ``steps`` are those that another followed, ``moves`` those that
    succeeded."""

    def __init__(self) -> None:
        self.steps: list[ProbedStep] = []
        self.moves: list[ProbedMove] = []
        self._last: tuple[StepShape, float, float] | None = None

    def begins(self, now: float) -> None:
        """Note that a step begins."""
        if self._last is not None:
            shape, start, seconds = self._last
            self.steps.append(ProbedStep(shape, start, now, seconds))
            self._last = None

    def ended(self, batch: StepBatch, start: float, seconds: float) -> None:
        self._last = (step_shape(batch), start, seconds)

    def pause(self) -> None:
        """Note a pause: the next step does not follow the last one at once."""
        self._last = None

    def handle(self, event: events.Event) -> None:
        """Listen to the engine's events."""
        assert isinstance(event, events.AdapterLoaded | events.AdapterPlaced)
        stage = "disk" if isinstance(event, events.AdapterLoaded) else "slot"
        self.moves.append(ProbedMove(stage, event.time - event.seconds, event.time, event.nbytes))

    def following(self) -> list[ProbedStep]:
        """Return the steps that another followed at once, because there was work."""
        return [step for step in self.steps if step.wall - step.seconds < IDLE_SECONDS]

    def overlaps(self, step: ProbedStep) -> dict[str, float]:
        """Return the seconds of the step in which something was moved, by stage."""
        found = {"disk": 0.0, "slot": 0.0}
        for move in self.moves:
            found[move.stage] += max(min(move.end, step.until) - max(move.start, step.start), 0.0)
        return found


class ProbedEngine(AsyncEngine):
    """The live engine with a probe between it and its device."""

    async def _build(self, work: ThreadPoolExecutor, progress: LoadProgress | None) -> Built:
        built = await super()._build(work, progress)
        self.probe = Probe()
        return built._replace(device=cast(Device, _ProbedDevice(built.device, self.probe)))

    async def start(self, *, progress: LoadProgress | None = None) -> None:
        await super().start(progress=progress)
        self.add_listener(self.probe.handle, events.AdapterLoaded, events.AdapterPlaced)


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
