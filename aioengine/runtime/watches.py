"""Watches of a running engine: an event loop that is late, and a policy that lets requests wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aioengine.core import Core
from aioengine.schedulers.policy import Location

logger = logging.getLogger("aioengine")

LAG_INTERVAL_SECONDS = 0.25
IDLE_WARNING_SECONDS = 5.0


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


class IdleWatch:
    """Detects a policy that leaves requests waiting although nothing prevents them from running.

    It logs each such period once and does nothing else, because the policy may intend it."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._since: float | None = None
        self._said = False

    def look(self, now: float, *, idle: bool) -> None:
        """Check after a decision. ``idle`` means that no batch was formed and no adapter is moving."""
        if not idle or not self._core.queues:
            self._since, self._said = None, False
            return
        if self._since is None:
            self._since = now
        seconds = now - self._since
        if self._said or seconds < IDLE_WARNING_SECONDS:
            return
        self._said = True
        heads = self._core.queues.heads.values()
        cold = sum(len(e.waiting) for e in heads if e is not None and e.location is not Location.SLOT)
        waiting = len(self._core.queues)
        logger.warning(
            "policy %s has started nothing for %.0f s: %d requests wait (%d that could run, %d whose "
            "adapters are in no slot), nothing runs and no adapter is moving",
            self._core.guard.name,
            seconds,
            waiting,
            waiting - cold,
            cold,
        )
