"""Records whether the policy under test made all decisions of a run."""

from __future__ import annotations

from typing import Any

from aioengine import events


class PolicyWatch:
    """Listener that counts where another policy decided."""

    HEARD = (events.StepsFinished, events.PolicyFailed, events.PolicyOverran, events.PolicyReplaced)

    def __init__(self) -> None:
        self._counts = {"steps": 0, "fallback_steps": 0, "failures": 0}
        self._is_replaced = False
        self._first: tuple[str | None, str | None] = (None, None)
        """Reason and traceback of the first failure."""

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.StepsFinished):
            self._counts["steps"] += len(event.seconds)
            self._counts["fallback_steps"] += len(event.seconds) * self._is_replaced
        elif isinstance(event, events.PolicyReplaced):
            self._is_replaced = True
        elif isinstance(event, events.PolicyFailed):
            self._counts["fallback_steps"] += event.call == "schedule"
            self._failed(event.error, event.traceback)
        elif isinstance(event, events.PolicyOverran):
            self._failed(f"a decision took {event.seconds:.4f} s, the budget is {event.budget:g} s", None)

    def _failed(self, reason: str, traceback: str | None) -> None:
        if not self._counts["failures"]:
            self._first = reason, traceback
        self._counts["failures"] += 1

    def summary(self, name: str) -> dict[str, Any]:
        """Return the part ``policy`` of a summary. A run is valid if every decision and every order of
        eviction was the policy's own, and it heard all events; otherwise its figures are those of another
        policy."""
        reason, traceback = self._first
        valid = not (self._counts["failures"] or self._counts["fallback_steps"])
        return {"name": name, **self._counts, "reason": reason, "traceback": traceback, "valid": valid}
