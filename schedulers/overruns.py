"""Overruns: when something that decides too slowly is to be asked no more."""

from __future__ import annotations

FORGIVEN_AFTER = 1000
"""After this many decisions in time in a row, earlier overruns are forgotten."""


class Overruns:
    """Counts the decisions that were too slow.

    A decision is too slow if it takes more than ``budget`` seconds of processor time. Time without the
    processor is another matter: on a busy machine a few decisions wait long for it, however good they are;
    something that waits for a disk, a lock or a network does so in most decisions. So each decision that
    waits longer than ``budget`` is weighed against one that does not.
    """

    def __init__(self, budget: float, most: int) -> None:
        self.budget = budget
        self.count = 0
        """Decisions that were too slow and are not forgiven."""
        self._most = most
        self._in_time = 0
        self._waits = 0
        """Decisions that have waited, less those that have not; at least 0."""

    def add(self, took: float, used: float) -> bool:
        """Count a decision that took ``took`` seconds, ``used`` of them of processor time. Returns whether it
        was too slow."""
        waited = took - used > self.budget
        self._waits = max(self._waits + (1 if waited else -1), 0)
        if used > self.budget:
            self._in_time = 0
            self.count += 1
            return True
        self._in_time += 1
        if self._in_time >= FORGIVEN_AFTER:
            self.count = 0
        return False

    @property
    def complaint(self) -> str:
        """Reason to ask for no more decisions; empty if there is none."""
        limit = f"more than {self.budget * 1e3:g} ms"
        if self.count >= self._most:
            return f"took {limit} {self.count} times"
        if self._waits >= self._most:
            return f"waited for {limit} in most of its decisions"
        return ""
