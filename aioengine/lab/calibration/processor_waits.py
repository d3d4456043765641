"""The time that this process waits for processors while something is timed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_TASKS = Path("/proc/self/task")


class Waits:
    """Counts the time that this process's threads were ready to run but had no processor, from its
    construction on. Linux measures it; elsewhere it is 0."""

    def __init__(self) -> None:
        self._start = _waited()

    def seconds(self) -> float:
        """Return the sum over all threads, in seconds."""
        return max(_waited() - self._start, 0.0)  # less if a thread has ended


def _waited() -> float:
    nanoseconds = 0
    with suppress(OSError):
        for task in _TASKS.iterdir():
            with suppress(OSError, IndexError, ValueError):  # it has ended, or there are no such statistics
                nanoseconds += int((task / "schedstat").read_text(encoding="ascii").split()[1])
    return nanoseconds * 1e-9
