"""StepsAhead: steps of a device whose time goes on only while the event loop waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from functools import partial
from types import coroutine
from typing import Any, NamedTuple

from aioengine.core import Core
from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.lab.simulation.device import SimulatedDevice
from aioengine.lab.simulation.repeated import Repeated, RepeatedSteps
from aioengine.runtime.event_stream import NO_TIME, Decided, NoteSteps
from aioengine.runtime.loop import Ahead
from aioengine.step import StepBatch, StepResult

SETTLING = 4
"""Turns of the loop in which callers that have their results go on, and moves of adapters begin. If these do
not suffice, a step is executed as on a real device."""


@coroutine
def _turn() -> Generator[None, None, None]:
    """Let the loop take a turn."""
    yield


class _Series(NamedTuple):
    """Steps that repeat each other."""

    batch: StepBatch
    contents: dict[str, Any]
    steps: RepeatedSteps


class StepsAhead(Ahead):
    """Runs steps in as few turns of the event loop as possible: many at once if they repeat each other, and
    any other one at once if nothing else is due before its end.

    Args:
        note: Reports steps that have ended.
        publish: Delivers what was reported.
    """

    def __init__(
        self, device: SimulatedDevice, core: Core, note: NoteSteps, publish: Callable[[], None]
    ) -> None:
        self._device = device
        self._core = core
        self._note = note
        self._publish = publish
        self._series: _Series | None = None
        """Steps that the device can go on repeating."""
        self._repeating: RepeatedSteps | None = None
        """Steps that the device repeats, some of which may have ended and not been taken in."""
        core.count_decodes(device.token, device.final, device.last)

    @property
    def repeated(self) -> StepBatch | None:
        return None if self._series is None else self._series.batch

    async def run(self, batch: StepBatch, decided: Decided) -> bool:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualTimeLoop):
            return False
        for _ in range(SETTLING):
            if loop.next_timer() is not None:
                break
            await _turn()
        series, self._series = self._series, None
        if series is not None and batch is series.batch:
            series.steps.go_on(self._core.again_until())
        else:
            series = self._repeat(batch)
        if series is None:
            result = self._device.execute_at_once(batch)
            if result is not None:
                self._finished(batch, batch.contents()._asdict(), result, decided)
            return result is not None
        self._repeating = series.steps
        try:
            result = await self._repeating
        finally:
            self._repeating = None
        if result is None:
            self._series = series
        else:
            self._finished(batch._replace(step=self._core.step), series.contents, result, NO_TIME)
        return True

    def interrupt(self) -> None:
        if self._repeating is not None:
            self._repeating.interrupt()

    def goes_on(self) -> bool:
        return self._repeating is not None and self._core.again_until() >= self._repeating.until

    def catch_up(self) -> None:
        if self._repeating is not None:
            self._repeating.catch_up()

    def _repeat(self, batch: StepBatch) -> _Series | None:
        """Have the device run ``batch`` and its repetitions."""
        steady = self._core.steady(batch)
        if steady is None:
            return None
        contents = batch.contents()._asdict()
        steps = self._device.repeat(batch, *steady, partial(self._take, batch, contents))
        return None if steps is None else _Series(batch, contents, steps)

    def _take(self, batch: StepBatch, contents: dict[str, Any], steps: Repeated, goes_on: bool) -> None:
        first = self._core.step
        found = self._core.steps_finished(batch, steps.token, steps.ends, goes_on=goes_on)
        self._note(first, contents, list(zip(steps.ends, steps.seconds, found, strict=True)))
        self._publish()

    def _finished(
        self, batch: StepBatch, contents: dict[str, Any], result: StepResult, decided: Decided
    ) -> None:
        now = asyncio.get_running_loop().time()
        took = now, result.seconds, self._core.step_finished(batch, result, now)
        self._note(batch.step, contents, [took], decided)
        self._publish()
