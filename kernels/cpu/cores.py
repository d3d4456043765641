"""Number of threads that a step should have: the physical cores that this process may use, within its quota.

Two threads of one core share its arithmetic units and its caches, which one of them keeps busy in a step. A
container's quota of processor time is not seen in the number of processors: with more threads than it allows,
all of them are stopped together for the rest of each period (of 100 ms, mostly), in the middle of a step.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

ENV = "OMP_NUM_THREADS"


class Cores(NamedTuple):
    """Processors that this process may compute on."""

    logical: int
    """Processors of its affinity mask: what OpenMP, and so torch, takes by default."""
    physical: int
    """Cores that these belong to."""
    quota: float = math.inf
    """Processors' worth of time that its control groups allow."""

    @property
    def threads(self) -> int:
        """Number of threads of a step by default."""
        return max(1, math.floor(min(self.quota, self.physical)))

    def chosen(self, asked: int) -> int:
        """Return the number of threads where torch has ``asked`` of them: that, unless it is torch's
        default."""
        return asked if ENV in os.environ or asked != self.logical else self.threads


def threads() -> int:
    """Return the number of threads of a step: as many as torch was told to use, else what the cores say."""
    return cores().chosen(torch.get_num_threads())


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
    return Cores(len(numbers), len(siblings), min(_quotas(root), default=math.inf))


def _affinity() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _quotas(root: Path) -> Iterable[float]:
    """Processors by the files of the process's control groups and those above them, which bound it too."""
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
                        yield limit / period
                else:
                    # "max 100000" without a limit: float() refuses it.
                    limit, period = map(float, _read(folder / "cpu.max").split())
                    yield limit / period


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
