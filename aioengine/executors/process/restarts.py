"""Limits how often, and how soon, lost workers are started again."""

from __future__ import annotations

from collections import deque

from aioengine.adapters.loader import Backoff

MAX_RESTARTS = 5
WINDOW_SECONDS = 600.0
FIRST_WAIT_SECONDS = 0.5


class RestartLimit:
    """Limit of ``most`` restarts within ``window`` seconds. The first is at once, the others after growing
    waits."""

    def __init__(self, most: int = MAX_RESTARTS, window: float = WINDOW_SECONDS) -> None:
        self.most = most
        self.window = window
        self._times: deque[float] = deque()
        self._backoff = Backoff(0, FIRST_WAIT_SECONDS)

    def next(self, now: float) -> float | None:
        """Count one more restart. Returns the seconds to wait before it, or None if there were too many."""
        while self._times and self._times[0] <= now - self.window:
            self._times.popleft()
        before = len(self._times)
        if before >= self.most:
            return None
        self._times.append(now)
        return self._backoff.seconds(before) if before else 0.0
