"""Virtual time: an event loop on which waiting takes no time, because its clock jumps to the next timer.

This is a small file of our own. The libraries for this purpose do more (`looptime` rounds times and guards
against idle loops in tests, `async-solipsism` also simulates sockets), which is not needed here and costs
time in each of the hundreds of thousands of loop iterations of a run.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from heapq import heappush
from math import ulp
from typing import Any, TypeVar, TypeVarTuple

from aioengine.errors import AioEngineError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class NothingToWaitFor(AioEngineError):
    """Error for a virtual-time loop in which everything waits and no timer is set: it would wait for ever."""


class _Jumping(selectors.SelectSelector):
    """Selector that moves the clock instead of waiting, and never looks at a file."""

    loop: VirtualTimeLoop
    now: float = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            waiting = sorted(task.get_name() for task in asyncio.all_tasks(self.loop))
            raise NothingToWaitFor(
                f"at {self.now:g} s of virtual time everything waits and no timer is set; tasks that wait: "
                f"{', '.join(waiting[:10]) or 'none'}. Threads and sockets cannot be waited for here"
            )
        if timeout > 0.0:  # the next timer's time to the last bit, whatever went off since it was set
            self.go_to(self.loop._scheduled[0].when())
        return []

    def go_to(self, now: float) -> None:
        self.now = now
        self.loop._clock_resolution = resolution(now)


def resolution(now: float) -> float:
    """Return the clock's resolution: timers go off that are due before ``now`` plus this, which must not be
    lost in the last bit of ``now``."""
    return max(1e-9, ulp(now))


class _Timer(asyncio.TimerHandle):
    """Timer that goes off after those that were set before it for the same time. asyncio's order among them
    depends on all other timers."""

    number: int
    _scheduled: bool
    _when: float

    def __lt__(self, other: object) -> bool:
        assert type(other) is _Timer
        mine, others = self._when, other._when
        return mine < others or (mine == others and self.number < other.number)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Event loop in virtual time, for coroutines that wait for timers and for each other, not for threads or
    sockets. Starts at 0.

    Coroutines run in the same order in every run. When everything waits and no timer is set, the loop's
    ``run_...`` raises :class:`NothingToWaitFor`.
    """

    _clock_resolution: float
    _scheduled: list[asyncio.TimerHandle]
    """asyncio's own, which are not in the type stubs."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        self._jumping.loop = self
        self._timers = 0
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, context)
        timer.number = self._timers
        self._timers += 1
        heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    @contextmanager
    def at(self, time: float) -> Iterator[None]:
        """Context in which the clock shows another time: for what has happened then, and is told only now."""
        now = self._jumping.now
        self._jumping.go_to(time)
        try:
            yield
        finally:
            self._jumping.go_to(max(now, time))

    def go_to(self, now: float) -> None:
        """Move the clock. No timer may go off before."""
        self._jumping.go_to(now)


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run like ``asyncio.run``, on a new loop in virtual time.

    If a loop is running already, as in a notebook, it is blocked while a thread does the work.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(main)
    with ThreadPoolExecutor(1, thread_name_prefix="aioengine-virtual-time") as threads:
        return threads.submit(_run, main).result()


def _run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
