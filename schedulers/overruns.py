"""Overruns: when something that decides too slowly is to be asked no more."""

from __future__ import annotations

import math

FORGIVEN_AFTER = 1000
"""After this many decisions in time in a row, earlier overruns are forgotten."""


class Overruns:
    """Counts the decisions that were too slow.

    A decision is too slow if it takes more than ``budget`` seconds of processor time. Time without the
    processor is another matter. On a busy machine a few decisions wait long for it, however good they are;
    something that waits for a disk, a lock or a network does so in most decisions. So each decision that
    waits longer than ``budget`` is weighed against one that does not.

    Fewer waits, but long ones, are weighed by their time. A process without a processor stands still between
    decisions as often as in them, for each second that it computes, and decisions are a small part of that.
    So if more than half of all time goes by in decisions that wait, the decisions themselves wait. The
    longest of the waits does not count: the process may have been stopped in the middle of it.
    """

    def __init__(self, budget: float, most: int) -> None:
        self.budget = budget
        self.count = 0
        """Decisions that were too slow and are not forgiven."""
        self._most = most
        self._in_time = 0
        self._waits = 0
        """Decisions that have waited, less those that have not; at least 0."""
        self._last = -math.inf
        """When the last decision ended."""
        self._balance = 0.0
        """Seconds that decisions have waited, less all others; at least 0."""
        self._longest = 0.0
        """Seconds of the longest wait since ``_balance`` was 0."""
        self._many = 0
        """Waits since then."""

    def add(self, took: float, used: float, at: float) -> bool:
        """Count a decision that took ``took`` seconds, ``used`` of them of processor time, and ended at
        ``at``. Returns whether it was too slow."""
        if took <= self.budget and not self._waits and not self._many:  # as nearly all are
            self._last = at
            self._forgive()
            return False
        waited = took - used if took - used > self.budget else 0.0
        self._waits = max(self._waits + (1 if waited else -1), 0)
        self._weigh(waited, at)
        if used <= self.budget:
            self._forgive()
            return False
        self._in_time = 0
        self.count += 1
        return True

    def _weigh(self, waited: float, at: float) -> None:
        self._balance += 2 * waited - (at - self._last)
        self._last = at
        if self._balance <= 0:
            self._balance, self._longest, self._many = 0.0, 0.0, 0
        elif waited:
            self._longest = max(self._longest, waited)
            self._many += 1

    def _forgive(self) -> None:
        self._in_time += 1
        if self._in_time >= FORGIVEN_AFTER:
            self.count = 0

    @property
    def complaint(self) -> str:
        """Reason to ask for no more decisions; empty if there is none."""
        limit = f"more than {self.budget * 1e3:g} ms"
        if self.count >= self._most:
            return f"took {limit} {self.count} times"
        if self._waits >= self._most:
            return f"waited for {limit} in most of its decisions"
        if self._many >= self._most and self._balance > self._longest:
            return f"waited for {limit} {self._many} times, for most of the time"
        return ""
