"""What the step loop measures beside the steps: decisions, gaps between tokens, and the loop's lag."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aioengine.core.state import AdapterEntry, Request
from aioengine.events import TokenInterval

LAG_INTERVAL_SECONDS = 0.25


class DecisionTimer:
    """The ``timer`` of a core, which reads it before and after each decision of the policy.

    ``seconds`` is what lay between the last two readings: after ``Core.schedule``, the time that the
    policy took.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        self.seconds = now - self._last
        self._last = now
        return now


class TokenIntervals:
    """Seconds between successive tokens of each request, counted by adapter.

    In a batch that decodes, most requests had their last token at the same moment: so a step of
    hundreds of tokens comes to a few intervals.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._runs: list[tuple[AdapterEntry | None, float, int]] = []
        """Adapter, time of the tokens before, and how many such came one after the other."""
        self._adapter: AdapterEntry | None = None
        self._since = 0.0
        self._tokens = 0
        """The run that goes on."""

    def token(self, request: Request, now: float) -> None:
        """``request`` has a new token. ``now`` is the same for all tokens of a step, and those of an
        adapter come one after the other: so most calls only count."""
        last = self._last.get(request.id)
        self._last[request.id] = now
        if last == self._since and request.adapter is self._adapter:
            self._tokens += 1
        elif last is not None:
            self._runs.append((self._adapter, self._since, self._tokens))
            self._adapter, self._since, self._tokens = request.adapter, last, 1

    def take(self, now: float) -> tuple[TokenInterval, ...]:
        """The intervals that the step at ``now`` ended."""
        runs = [*self._runs, (self._adapter, self._since, self._tokens)]
        self._runs.clear()
        self._tokens = 0
        return tuple(
            TokenInterval(None if adapter is None else adapter.label, now - since, tokens)
            for adapter, since, tokens in runs
            if tokens
        )

    def forget(self, request_id: str) -> None:
        self._last.pop(request_id, None)


class LoopLagMeter:
    """Tells ``report`` four times a second how late, in seconds, the event loop ran a timer.

    A timer and no task: there is nothing to cancel and wait for when the engine stops.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        # Not the loop's own clock: uvloop's stands still while a callback runs.
        self._due = time.perf_counter() + LAG_INTERVAL_SECONDS
        self._handle = asyncio.get_running_loop().call_later(LAG_INTERVAL_SECONDS, self._tick)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _tick(self) -> None:
        lag = max(time.perf_counter() - self._due, 0.0)
        self.start()
        self._report(lag)
