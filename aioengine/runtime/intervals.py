"""What the step loop measures beside the steps: decisions, gaps between tokens, and the loop's lag."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter

from aioengine.core.state import Request, Status
from aioengine.events import TokenInterval

LAG_INTERVAL_SECONDS = 0.25


class TokenIntervals:
    """Seconds between successive tokens of each request, counted by adapter.

    In steady decode the same requests have a token in every step, and all gaps are equal: so a step is
    compared with the one before as a whole, and only those that differ are looked at one by one.
    """

    def __init__(self) -> None:
        self._step: list[Request] = []
        self.token: Callable[[Request], None] = self._step.append
        """To be called for each request that has a new token in the step."""
        self._before: list[Request] = []
        self._before_set: set[Request] = set()
        self._before_at = 0.0
        self._counts: Counter[str | None] = Counter()
        """Adapters of ``_before``, and how many of its requests are theirs."""
        self._older: dict[Request, float] = {}
        """When those had their last token that were passed over since, after a preemption say."""

    def take(self, now: float) -> tuple[TokenInterval, ...]:
        """The intervals that the step at ``now`` ended."""
        if not self._step:
            return ()
        came, gone = self._changes()
        for request in gone:
            self._counts[_label(request)] -= 1
            self._older[request] = self._before_at
        gap = now - self._before_at
        found = [TokenInterval(label, gap, tokens) for label, tokens in self._counts.items() if tokens]
        for request in came:
            self._counts[_label(request)] += 1
            since = self._older.pop(request, None)
            if since is not None:
                found.append(TokenInterval(_label(request), now - since, 1))
        if came or gone:
            self._counts = +self._counts  # without those of no request
            self._older = {r: at for r, at in self._older.items() if r.status is not Status.ENDED}
        self._before_at = now
        self._step.clear()
        return tuple(found)

    def _changes(self) -> tuple[Sequence[Request], Sequence[Request]]:
        """Who is in this step and was not in the one before, and the other way round."""
        if self._step == self._before:
            return (), ()
        self._before = list(self._step)
        step = set(self._step)
        came, gone = step - self._before_set, self._before_set - step
        self._before_set = step
        by_arrival = attrgetter("seq")  # sets have no order, and what is told must not depend on luck
        return sorted(came, key=by_arrival), sorted(gone, key=by_arrival)


def _label(request: Request) -> str | None:
    return None if request.adapter is None else request.adapter.label


class LoopLagMeter:
    """Tells ``report`` four times a second how late, in seconds, the event loop ran a timer.

    A timer and no task: there is nothing to cancel and wait for when the engine stops.
    """

    def __init__(self, report: Callable[[float], None], timer: Callable[[], float]) -> None:
        self._report = report
        self._timer = timer
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        # A timer, for the loop's own clock may not do: uvloop's stands still while a callback runs.
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
