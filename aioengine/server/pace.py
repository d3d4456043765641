"""Estimates ``Retry-After``: the time that the queue takes at the recent rate."""

from __future__ import annotations

import math
from collections import deque

WINDOW_SECONDS = 60.0
LONGEST_SECONDS = 120


class Pace:
    """Times of the answers in the last minute, at most 1,000 of them."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._times: deque[float] = deque(maxlen=1000)

    def answered(self, now: float) -> None:
        self._times.append(now)

    def retry_after(self, waiting: int, now: float) -> int:
        """Estimate the seconds until ``waiting`` requests are answered, between ``least`` and
        ``LONGEST_SECONDS``."""
        times = self._times
        while times and times[0] < now - WINDOW_SECONDS:
            times.popleft()
        if not times:  # nothing is known: most likely a server that has just begun
            return self._least
        rate = len(times) / max(now - times[0], 1.0)
        return max(self._least, min(math.ceil(waiting / rate), LONGEST_SECONDS))
