"""How long an event loop computes at a time."""

from __future__ import annotations

import asyncio
import time


class LongestHold:
    """Longest time for which this thread's loop computed in one pass, in ``seconds`` of processor time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.thread_time()
        self._loop = asyncio.get_running_loop()
        self._beat()

    def _beat(self) -> None:
        now = time.thread_time()
        self.seconds, self._last = max(self.seconds, now - self._last), now
        self._loop.call_soon(self._beat)
