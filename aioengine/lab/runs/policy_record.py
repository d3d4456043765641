"""Records whether the policy under test made all decisions of a run."""

from __future__ import annotations

from typing import NamedTuple

from aioengine import events


class PolicyRecord(NamedTuple):
    """Record of the policy under test."""

    steps: int
    """Steps of the model in the run."""
    fallback_steps: int
    """Decisions that the built-in safe policy made in its place."""
    failures: int
    """Calls of the policy that raised, or whose answer was not valid."""
    reason: str | None = None
    """The first failure."""
    traceback: str | None = None

    @property
    def valid(self) -> bool:
        """Whether every decision and every order of eviction was the policy's own, and it heard all events.
        Otherwise the figures of the run are those of another policy."""
        return self.failures == 0 and self.fallback_steps == 0


class PolicyWatch:
    """Listener that counts where another policy decided."""

    HEARD = (events.StepsFinished, events.PolicyFailed, events.PolicyOverran, events.PolicyReplaced)

    def __init__(self) -> None:
        self._steps = self._fallback = self._failures = 0
        self._is_replaced = False
        self._reason: str | None = None
        self._traceback: str | None = None

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.StepsFinished):
            self._steps += len(event.seconds)
            self._fallback += len(event.seconds) * self._is_replaced
        elif isinstance(event, events.PolicyFailed):
            self._failures += 1
            self._fallback += event.call == "schedule"
            self._note(event.error, event.traceback)
        elif isinstance(event, events.PolicyOverran):
            self._failures += 1
            self._note(f"a decision took {event.seconds:.4f} s, the budget is {event.budget:g} s", None)
        elif isinstance(event, events.PolicyReplaced):
            self._is_replaced = True

    def _note(self, reason: str, traceback: str | None) -> None:
        if self._reason is None:
            self._reason, self._traceback = reason, traceback

    def record(self) -> PolicyRecord:
        return PolicyRecord(self._steps, self._fallback, self._failures, self._reason, self._traceback)
