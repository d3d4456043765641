"""Steps of a simulated device that repeat each other, taken in when somebody looks."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Generator, Iterator
from typing import Any

from aioengine.executors.base import Repeated, TakeSteps
from aioengine.lab.simulation.clock import VirtualTimeLoop, resolution
from aioengine.lab.simulation.transfers import Processor
from aioengine.step import Sampled, StepResult

PLANNED = 64
"""Steps whose ends are computed ahead: more would often be for nothing, because something happens before."""


class RepeatedSteps:
    """The :class:`~aioengine.executors.base.Repeating` of a simulated device. Times are those of steps that
    are executed one by one, to the last bit.

    Args:
        work: Seconds of each step, its overhead included, if nothing disturbs the processor.
        most: Number of steps at most; 1 or more.
        until: Time before which each step begins; it must be later than now.
        overhead: Seconds of each step that do not count as the model's.
        sequences: Number of sequences in each step.
        take: Takes in steps that have ended.
    """

    def __init__(
        self,
        loop: VirtualTimeLoop,
        processor: Processor,
        work: Iterator[float],
        *,
        most: int,
        until: float,
        overhead: float,
        token: Sampled,
        sequences: int,
        take: TakeSteps,
    ) -> None:
        self._loop = loop
        self._processor = processor
        self._more = work
        self._left = most
        self._until = until
        self._overhead = overhead
        self._token = token
        self._sequences = sequences
        self._take = take
        self._began = loop.time()
        """When the first step began that was not taken in."""
        self._ends: list[float] = []
        """Ends of the steps from that one on, as far as they are planned."""
        self._work: list[float] = []
        """Seconds of their work."""
        self._interrupted = False
        self._woken: asyncio.Future[None] | None = None
        self._plan()
        processor.before_change = self.interrupt

    def __await__(self) -> Generator[Any, None, StepResult | None]:
        return self._run().__await__()

    async def _run(self) -> StepResult | None:
        try:
            while not self._interrupted:
                last = self._ends[-1]
                timer = self._loop.next_timer()
                if timer is not None and last + resolution(last) <= timer:
                    self._loop.go_to(last)  # nothing happens before, so that no turn of the loop is needed
                elif not await self._reached(last):
                    break
                count = len(self._ends)
                self._plan()
                goes_on = len(self._ends) > count
                self._taken(count, goes_on=goes_on)
                if not goes_on:
                    return None
            took = await self._processor.end()
            return StepResult([self._token] * self._sequences, took - self._overhead)
        finally:
            self._processor.before_change = None

    async def _reached(self, end: float) -> bool:
        """Wait for this time. Returns False if the steps were interrupted before."""
        self._woken = self._loop.create_future()
        timer = self._loop.call_at(end, _wake, self._woken)
        try:
            await self._woken
        finally:
            timer.cancel()
            self._woken = None
        return not self._interrupted

    def catch_up(self) -> None:
        if not self._interrupted:
            count = bisect_left(self._ends, self._loop.time())
            if count:
                self._taken(min(count, len(self._ends) - 1), goes_on=True)

    def interrupt(self) -> None:
        if self._interrupted or not self._ends:
            return
        self.catch_up()
        self._interrupted = True
        self._processor.begin(self._work[0], self._began)
        if self._woken is not None:
            _wake(self._woken)

    def _plan(self) -> None:
        """Compute the ends of more steps."""
        pace, begin = self._processor.pace, self._ends[-1] if self._ends else self._began
        for _ in range(min(self._left, PLANNED)):
            if begin >= self._until:
                break
            work = next(self._more)
            begin += work * pace
            self._ends.append(begin)
            self._work.append(work)
            self._left -= 1

    def _taken(self, count: int, *, goes_on: bool) -> None:
        """Take in the first ``count`` of the planned steps."""
        if not count:
            return
        ends, begin, seconds = self._ends[:count], self._began, []
        for end in ends:
            seconds.append(end - begin - self._overhead)
            begin = end
        self._began = begin
        del self._ends[:count], self._work[:count]
        self._take(Repeated(self._token, ends, seconds), goes_on)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
