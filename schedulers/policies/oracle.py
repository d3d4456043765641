"""The clairvoyant policy, a yardstick for others when a trace is replayed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import inf

from aioengine.schedulers.parts.arrival import Arrival
from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.parts.lookahead import Lookahead
from aioengine.schedulers.parts.none import NoPreemption
from aioengine.schedulers.policies.fcfs import SLOT_BOUND
from aioengine.schedulers.policy import AdapterView, SchedulerView, SlotView


class Belady(Replacement):
    """Evicts the idle adapter whose next use lies furthest in the future; for replayed traces only.

    score = -(time of the next use). That is now if a request waits for the adapter, else its next arrival in
    ``future``, or infinity if there is none. For slots filled on demand by one request after the other, no
    replacement makes fewer swaps. With prefetch, batches, or adapters of unequal load times it is a
    yardstick, not a bound.

    Args:
        future: (arrival time, adapter) of every request of the trace, in any order.
        start: What the engine's clock reads when the trace's clock reads 0.
    """

    source = "Belady 1966, A study of replacement algorithms for a virtual-storage computer"

    def __init__(self, future: Sequence[tuple[float, str]] | None = None, start: float = 0.0) -> None:
        if future is None:
            raise ValueError(
                "future=None: must be the (arrival time, adapter) of all future requests; this policy only "
                "makes sense where a trace is replayed, so that they are known"
            )
        self._arrivals: dict[str, list[float]] = {}
        for arrival, name in sorted(future):
            self._arrivals.setdefault(name, []).append(arrival + start)

    def next_use(self, name: str, now: float) -> float:
        """Return the time of the adapter's next request after ``now``; infinity if there is none."""
        arrivals = self._arrivals.get(name, [])
        index = bisect_right(arrivals, now)
        return arrivals[index] if index < len(arrivals) else inf

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return self.cpu_score(view, adapter)

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return -view.now if adapter.waiting else -self.next_use(adapter.name, view.now)


class Oracle(Composed):
    """First come, first served, with clairvoyant replacement (Belady); for replayed traces only.

    Args:
        future: (arrival time, adapter) of every request of the trace, in any order.
        start: What the engine's clock reads when the trace's clock reads 0.
        max_wait: Seconds that an adapter's oldest request waits before others make way for it.
    """

    source = Belady.source
    starvation_bound = f"{SLOT_BOUND}; then {Arrival.starvation_bound}"

    def __init__(
        self,
        future: Sequence[tuple[float, str]] | None = None,
        start: float = 0.0,
        max_wait: float = 1.0,
    ) -> None:
        super().__init__(Arrival(), Belady(future, start), Lookahead(), NoPreemption(), max_wait=max_wait)
