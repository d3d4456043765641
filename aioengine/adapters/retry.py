"""Trying again what failed for a passing reason: exponential backoff with jitter.

After Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), its "equal jitter": half of
each wait is fixed and half is random, so that readers of one disk do not come back all at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aioengine.errors import AdapterError, AdapterLoadError

Retrying = Callable[[int, float, AdapterError], None]
"""Told (attempts failed so far, seconds until the next, why) before each wait."""

T = TypeVar("T")


class Backoff:
    """Waits of ``base``, 2 ``base``, 4 ``base``, ... seconds, each times a random 0.5 to 1.

    Args:
        retries: How often to try again; 0 for never.
        base: Seconds.
        seed: The waits are the same for the same seed.
    """

    def __init__(self, retries: int, base: float, *, seed: int = 0) -> None:
        self.retries = retries
        self._base = base
        self._rng = random.Random(seed)

    def seconds(self, failed: int) -> float:
        """How long to wait after ``failed`` attempts, 1 or more."""
        return self._base * float(2 ** (failed - 1)) * self._rng.uniform(0.5, 1.0)

    async def run(self, attempt: Callable[[], Awaitable[T]], retrying: Retrying) -> T:
        """The first result of ``attempt``. Waits on the loop's clock, holds nothing meanwhile, and can be
        cancelled. Raises an AdapterError once a read failed for good, or ``retries`` times more."""
        failed = 0
        while True:
            try:
                return await attempt()
            except AdapterError as error:
                failed += 1
                if not error.transient:
                    raise
                if failed > self.retries:
                    if failed == 1 or not isinstance(error, AdapterLoadError):
                        raise
                    reason = f"{error.reason} ({failed} attempts, the last just now)"
                    raise AdapterLoadError(
                        reason, name=error.name, path=error.path, transient=True
                    ) from error
                seconds = self.seconds(failed)
                retrying(failed, seconds, error)
            await asyncio.sleep(seconds)
