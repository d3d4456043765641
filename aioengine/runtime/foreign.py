"""Failures of code that users of the engine have written: event listeners and resolvers."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger("aioengine")


class ForeignCode:
    """Takes what such code raises. It may raise anything, a CancelledError too, and must not stop the engine.
    Every failure is counted, and the first of its kind is logged."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """By what has failed: "listener" or "resolver"."""
        self._logged: set[tuple[object, ...]] = set()

    def failed(self, what: str, code: object, error: BaseException, on: str) -> None:
        """Note that ``code``, a listener or resolver, has failed on something. Raises KeyboardInterrupt
        again."""
        if isinstance(error, KeyboardInterrupt):
            raise error
        self.failures[what] += 1
        name = getattr(code, "__qualname__", type(code).__qualname__)
        if (kind := (what, name, type(error))) not in self._logged:
            self._logged.add(kind)
            logger.error(
                "the %s %s failed on %s (logged once, counted each time)", what, name, on, exc_info=error
            )
