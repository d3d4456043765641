"""Number of threads that a step should have: the physical cores that this process may use, within its quota.

Two threads of one core share its arithmetic units and its caches, which one of them keeps busy in a step. A
container's quota of processor time is not seen in the number of processors: with more threads than it allows,
all of them are stopped together for the rest of each period (of 100 ms, mostly), in the middle of a step.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("aioengine")

ENV = "OMP_NUM_THREADS"


class Cores(NamedTuple):
    """Processors that this process may compute on."""

    logical: int
    """Processors of its affinity mask: what OpenMP, and so torch, takes by default."""
    physical: int
    """Cores that these belong to."""
    quota: float = math.inf
    """Processors' worth of time that its control groups allow."""
    quota_file: str = ""
    """File that the quota was read from."""

    @property
    def threads(self) -> int:
        """Number of threads of a step by default."""
        return max(1, math.floor(min(self.quota, self.physical)))

    def chosen(self, asked: int) -> int:
        """Return the number of threads where torch has ``asked`` of them: that, unless it is torch's
        default."""
        return asked if ENV in os.environ or asked != self.logical else self.threads

    def complaint(self, asked: int) -> str | None:
        """Return what to tell a user whose torch has more threads than the quota allows."""
        if asked <= self.quota:
            return None
        enough = max(1, math.floor(self.quota))
        steps = "steps use that many" if self.chosen(asked) == asked else f"steps use {self.chosen(asked)}"
        return (
            f"the quota of processor time is {self.quota:.3g} processors ({self.quota_file}), but torch has "
            f"{asked} threads ({steps}): with threads beyond the quota, all are stopped for a part of each "
            f"period, and every step takes longer; set {ENV}={enough}, or give the container more processors"
        )


@functools.cache
def cores() -> Cores:
    """Return what this process may compute on, found out once."""
    return find_cores(_affinity())


def find_cores(processors: Iterable[int], root: Path = Path("/")) -> Cores:
    """Return the cores and the quota for these processors, as the files below ``root`` say; see
    :class:`Cores`."""
    numbers = list(processors)
    siblings = {
        _read(root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") or str(number)
        for number in numbers
    }
    quotas = dict(_quotas(root))
    source = min(quotas, key=quotas.__getitem__, default=None)
    if source is None:
        return Cores(len(numbers), len(siblings))
    return Cores(len(numbers), len(siblings), quotas[source], source)


def _affinity() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _quotas(root: Path) -> Iterable[tuple[str, float]]:
    """(file, processors) of the process's control groups and those above them, which bound it too."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        # In a container the path may be the host's, while the files are those of its own group.
        for folder in (parent for parent in (group, *group.parents) if parent.is_relative_to(top)):
            with suppress(ValueError):
                if controllers:  # version 1
                    limit, period = (
                        float(_read(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period")
                    )
                    if limit > 0:
                        yield str(folder / "cpu.cfs_quota_us"), limit / period
                else:
                    # "max 100000" without a limit: float() refuses it.
                    limit, period = map(float, _read(folder / "cpu.max").split())
                    yield str(folder / "cpu.max"), limit / period


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
