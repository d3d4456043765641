"""Watch of an event loop that is late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LAG_INTERVAL_SECONDS = 0.25


class LoopLagMeter:
    """Reports, four times a second, how late in seconds the event loop ran a timer.

    It is a timer and not a task, so there is nothing to cancel and await when the engine stops.
    """

    def __init__(self, report: Callable[[float], None], timer: Callable[[], float]) -> None:
        self._report = report
        self._timer = timer
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        # Not the loop's own clock: uvloop's stands still while a callback runs.
        self._due = self._timer() + LAG_INTERVAL_SECONDS
        self._handle = asyncio.get_running_loop().call_later(LAG_INTERVAL_SECONDS, self._tick)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _tick(self) -> None:
        lag = max(self._timer() - self._due, 0.0)
        self.start()
        self._report(lag)
