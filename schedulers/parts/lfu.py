"""Least frequently used with fading counts; other parts use the counts too."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, log2

from sortedcontainers import SortedList

from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.policy import AdapterView, PolicyEvent, SchedulerView, SlotView

MAX_NAMES = 16384
"""Maximum number of counted names; beyond it the least frequent one is forgotten."""


class DecayedCounts:
    """Counts of names, in which each count weighs half as much after ``half_life`` seconds.

    The stored value is log2(sum of 2^(t_i / half_life)) over the times t_i. All counts fade at the same rate,
    so neither this value nor the order changes with time.

    Args:
        half_life: Seconds; 0 for counts that do not fade.
    """

    def __init__(self, half_life: float) -> None:
        if not half_life >= 0:
            raise ValueError(f"half_life={half_life}: must be >= 0 seconds (0: counts do not fade)")
        self._rate = 1 / half_life if half_life > 0 else 0.0
        self._weights: dict[str, float] = {}
        self._ranking: SortedList[tuple[float, str]] = SortedList()

    def add(self, name: str, now: float, amount: float = 1.0) -> None:
        """Count ``amount`` more."""
        if amount <= 0:
            return
        weight = now * self._rate + log2(amount)
        old = self._weights.get(name)
        if old is not None:
            self._ranking.remove((old, name))
            weight, low = max(weight, old), min(weight, old)
            weight += log2(1 + 2 ** (low - weight))
        self._weights[name] = weight
        self._ranking.add((weight, name))
        if len(self._weights) > MAX_NAMES:
            del self._weights[self._ranking.pop(0)[1]]

    def weight(self, name: str) -> float:
        """Return a number that orders names by their counts and does not change with time; -inf if never
        counted."""
        return self._weights.get(name, -inf)

    def count(self, name: str, now: float) -> float:
        """Return the count at the time ``now``."""
        return float(2 ** (self.weight(name) - now * self._rate))

    def most(self) -> Iterator[str]:
        """Yield names, the most frequent first. Lazy."""
        return (name for _, name in reversed(self._ranking))

    def __len__(self) -> int:
        return len(self._weights)


class LFU(Replacement):
    """Evicts the least frequently used idle adapter; older uses count less.

    score = sum over the adapter's admitted requests of 2^(-age / half_life), on a scale of logarithms
    (which keeps the order). Counts outlive the stay in a slot.

    Args:
        half_life: Seconds after which a use counts half; 0: it counts in full for ever.
    """

    source = (
        "Lee et al. 2001, LRFU: a spectrum of policies that subsumes LRU and LFU (exponentially faded counts)"
    )

    def __init__(self, half_life: float = 300.0) -> None:
        self.counts = DecayedCounts(half_life)

    def on_event(self, event: PolicyEvent) -> None:
        if event.kind == "request_admitted" and event.adapter is not None:
            self.counts.add(event.adapter, event.now)

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return self.counts.weight(adapter.name)

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return self.counts.weight(adapter.name)
