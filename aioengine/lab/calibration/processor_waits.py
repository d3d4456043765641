"""The time that this process waits for processors while something is timed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CALM = 0.02
"""A timing counts if the threads waited for a processor for at most this share of it."""
DISTURBED = 0.05
"""Limit of this share for steps in serving, where the engine's own threads also wait for each other."""
_TASKS = Path("/proc/self/task")


def is_calm(waited: float, seconds: float) -> bool:
    """Whether a timing of so many seconds, during which threads waited so long, counts."""
    return waited <= CALM * max(seconds, 1e-9)


class Waits:
    """Counts the time that this process's threads were ready to run but had no processor, from its
    construction on, except during pauses. Linux measures it; elsewhere it is 0."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = _waited()
        """What had been waited when the last pause ended; None during one."""

    def pause(self) -> None:
        self._before, self._since = self.seconds(), None

    def go_on(self) -> None:
        if self._since is None:
            self._since = _waited()

    def seconds(self) -> float:
        """Return the sum over all threads, in seconds."""
        if self._since is None:
            return self._before
        return self._before + max(_waited() - self._since, 0.0)  # less if a thread has ended


def _waited() -> float:
    nanoseconds = 0
    with suppress(OSError):
        for task in _TASKS.iterdir():
            with suppress(OSError, IndexError, ValueError):  # it has ended, or there are no such statistics
                nanoseconds += int((task / "schedstat").read_text(encoding="ascii").split()[1])
    return nanoseconds * 1e-9
