"""Queue-driven prefetch: reads what the queue will need next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import inf

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Prefetch
from aioengine.schedulers.policy import Location, SchedulerView


class Lookahead(Prefetch):
    """Brings the next ``k`` adapters that requests wait for to the CPU, the most urgent first.

    Args:
        k: Number of adapters outside the slots to consider; those already on the CPU count, those that are
            being read do not.
    """

    source = "aioengine's own; S-LoRA (Sheng et al. 2023) reads ahead for its waiting queue likewise"

    def __init__(self, k: int = 8) -> None:
        at_least(1, k=k)
        self.k = k

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        ahead = islice((n for n in cold if view.adapters[n].location is not Location.LOADING), self.k)
        return [name for name in ahead if view.adapters[name].location is Location.DISK]

    def ask_again(self, view: SchedulerView) -> float | None:
        return inf
