"""Queue-driven prefetch: reads what the queue will need next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Prefetch
from aioengine.schedulers.policy import Location, SchedulerView


class Lookahead(Prefetch):
    """Brings the next ``k`` adapters that requests wait for to the CPU, the most urgent first.

    Args:
        k: Number of adapters outside the slots to consider; those already on the CPU count.
    """

    by_events = by_oldest = True
    source = "aioengine's own; S-LoRA (Sheng et al. 2023) reads ahead for its waiting queue likewise"

    def __init__(self, k: int = 8) -> None:
        at_least(1, k=k)
        self.k = k

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        names: list[str] = []
        for _, name in zip(range(self.k), cold, strict=False):
            if view.adapters[name].location is Location.DISK:
                names.append(name)
                if len(names) == view.load_room:
                    break
        return names
