"""Steps of a simulated device that repeat each other, taken in when somebody looks."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from aioengine.lab.simulation.clock import VirtualTimeLoop, resolution
from aioengine.lab.simulation.transfers import Processor
from aioengine.step import Sampled, StepResult

PLANNED = 64
"""Steps whose ends are computed ahead: more would often be for nothing, because something happens before."""


class Repeated(NamedTuple):
    """Steps that were run one after the other and repeated each other."""

    token: Sampled
    """Token that every sequence got in every step."""
    ends: Sequence[float]
    """Time at the end of each step."""
    seconds: Sequence[float]
    """Duration of each step, as in ``StepResult``."""


class TakeSteps(Protocol):
    """Callback that takes in steps that have ended; ``goes_on``: whether the next one is in flight."""

    def __call__(self, steps: Repeated, goes_on: bool) -> None: ...


class RepeatedSteps:
    """Steps that repeat each other. Times are those of steps that are executed one by one, to the last bit.

    Awaiting them waits for the last one. It returns None if all of them were taken in, or else the result of
    the last one, in which requests may end.

    Args:
        work: Seconds of each step, its overhead included, if nothing disturbs the processor.
        most: Number of steps at most; 2 or more.
        until: Time before which each step begins; it must be later than now.
        overhead: Seconds of each step that do not count as the model's.
        last: Returns the tokens of the last step, if there are ``most`` of them.
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
        last: Callable[[], Sequence[Sampled | None]],
        take: TakeSteps,
    ) -> None:
        self._loop = loop
        self._processor = processor
        self._more = work
        self._left = most
        self.until = until
        """Time before which each step begins."""
        self._overhead = overhead
        self._token = token
        self._last = last
        self._take = take
        self._began = loop.time()
        """When the first step began that was not taken in."""
        self._ends: list[float] = []
        """Ends of the steps from that one on, as far as they are planned."""
        self._work: list[float] = []
        """Seconds of work of these steps, and perhaps of further ones."""
        self._interrupted = self._last_in_flight = False
        self._woken: asyncio.Future[None] | None = None
        self._plan()

    def go_on(self, until: float) -> None:
        """Run further steps like these, from now on, of which each begins before ``until``. Call it only if
        all of them were taken in; then await them again."""
        self._began, self.until = self._loop.time(), until
        self._interrupted = self._last_in_flight = False
        self._plan()

    def __await__(self) -> Generator[Any, None, StepResult | None]:
        return self._run().__await__()

    async def _run(self) -> StepResult | None:
        self._processor.before_change = self.interrupt
        try:
            while not self._interrupted:
                last = self._ends[-1]
                timer = self._loop.next_timer()
                if timer is not None and last + resolution(last) <= timer:
                    self._loop.go_to(last)  # nothing happens before, so that no turn of the loop is needed
                elif not await self._reached(last):
                    break
                count = len(self._ends)
                if not self._left:
                    return self._take_last()
                self._plan()
                goes_on = len(self._ends) > count
                self._taken(count, goes_on=goes_on)
                if not goes_on:
                    return None
            await self._processor.end()
            self._ends.append(self._loop.time())
            if self._last_in_flight:
                return self._take_last()
            self._taken(len(self._ends), goes_on=False)
            return None
        finally:
            self._processor.before_change = None

    def _take_last(self) -> StepResult:
        """Take in all steps but the last one, and return its result."""
        end = self._ends.pop()
        self._taken(len(self._ends), goes_on=True)
        return StepResult(self._last(), end - self._began - self._overhead)

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
        """Take in the steps that have ended by now."""
        if self._ends:
            self._taken(len(self._ends) if self._interrupted else self._ended(), goes_on=True)

    def interrupt(self) -> None:
        """Run no step after the one in flight."""
        if self._interrupted or not self._ends:
            return
        self._interrupted = True
        ended = self._ended()
        planned = len(self._ends) - ended - 1
        self._last_in_flight = not self._left and not planned
        self._left += planned
        self._processor.begin(self._work[ended], self._ends[ended - 1] if ended else self._began)
        del self._ends[ended:]  # the pace may change before the end of the step in flight
        if self._woken is not None:
            _wake(self._woken)

    def _ended(self) -> int:
        """Count the planned steps that have ended by now and were not taken in. The last one ends only when
        that is waited for."""
        return min(bisect_left(self._ends, self._loop.time()), len(self._ends) - 1)

    def _plan(self) -> None:
        """Compute the ends of more steps."""
        pace, begin = self._processor.pace, self._ends[-1] if self._ends else self._began
        for _ in range(min(self._left, PLANNED)):
            if begin >= self.until:
                break
            if len(self._work) == len(self._ends):
                self._work.append(next(self._more))
            begin += self._work[len(self._ends)] * pace
            self._ends.append(begin)
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
