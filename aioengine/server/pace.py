"""Estimates ``Retry-After``: the time that a queue takes at the recent rate of its answers."""

from __future__ import annotations

import math
from collections import OrderedDict, deque

WINDOW_SECONDS = 60.0
LONGEST_SECONDS = 120
MAX_QUEUES = 1000

QueueName = tuple[str, str | None]
"""One tenant's or one adapter's own queue: ("tenant", NAME) or ("adapter", NAME)."""


class Pace:
    """Times of the answers in the last minute, at most 1,000 of them: of all requests together, and 100
    each of the queues that had the latest answers."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._all: deque[float] = deque(maxlen=1000)
        self._of: OrderedDict[QueueName, deque[float]] = OrderedDict()

    def answered(self, now: float, *queues: QueueName) -> None:
        """Count an answer to a request that waited in these queues."""
        self._all.append(now)
        for name in queues:
            self._of.setdefault(name, deque(maxlen=100)).append(now)
            self._of.move_to_end(name)
        while len(self._of) > MAX_QUEUES:
            self._of.popitem(last=False)

    def retry_after(self, waiting: int, now: float, queue: QueueName | None = None) -> int:
        """Estimate the seconds until ``waiting`` requests are answered, between ``least`` and
        ``LONGEST_SECONDS``: those of ``queue``, or all. A queue without an answer in the last minute is taken
        to be as fast as all together."""
        own = None if queue is None else self._of.get(queue)
        rate = _rate(own, now) or _rate(self._all, now)
        if rate is None:  # nothing is known: most likely a server that has just begun
            return self._least
        return max(self._least, min(math.ceil(waiting / rate), LONGEST_SECONDS))


def _rate(times: deque[float] | None, now: float) -> float | None:
    """Return answers per second, or None if there were none in the last minute."""
    while times and times[0] < now - WINDOW_SECONDS:
        times.popleft()
    return len(times) / max(now - times[0], 1.0) if times else None
