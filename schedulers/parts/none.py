"""The parts that do nothing: no prefetch, no preemption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aioengine.schedulers.parts.base import Preemption, Prefetch
from aioengine.schedulers.policy import SchedulerView


class NoPrefetch(Prefetch):
    """Reads an adapter only when a slot is available."""

    by_events = True

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        return ()


class NoPreemption(Preemption):
    """Lets every running request finish."""

    by_events = True

    def choose(self, view: SchedulerView) -> Sequence[str]:
        return ()
