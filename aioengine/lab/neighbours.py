"""How much of the machine other processes take while something is timed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

_TASKS = Path("/proc/self/task")


class Neighbours:
    """Counts from when it is made. The system counts processor time in ticks of 10 ms or so: an interval
    should be much longer."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._read()

    def share(self) -> float:
        """Of all processors' time since, how much was taken by others: 0 to 1."""
        busy, total, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0) if total > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        """Seconds: of all processors busy, of all processors, and of this process."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice
        total = sum(times) - twice
        own = self._process.cpu_times()
        return total - idle, total, own.user + own.system


class Waits:
    """Counts from when it is made how long this process's threads were ready to run and did not get a
    processor, which Linux counts in nanoseconds; where it is not known it is 0."""

    def __init__(self) -> None:
        self._start = _waited()

    def seconds(self) -> float:
        """Of all threads together."""
        return max(_waited() - self._start, 0.0)  # less if a thread has ended


def _waited() -> float:
    nanoseconds = 0
    with suppress(OSError):
        for task in _TASKS.iterdir():
            with suppress(OSError, IndexError, ValueError):  # it has ended, or there are no such statistics
                nanoseconds += int((task / "schedstat").read_text(encoding="ascii").split()[1])
    return nanoseconds * 1e-9
