"""First come, first served, with ageing: the default policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import islice

from aioengine.schedulers.parts.base import Ordering, is_cold
from aioengine.schedulers.parts.compose import SLOT_BOUND, Composed
from aioengine.schedulers.parts.lookahead import Lookahead
from aioengine.schedulers.parts.lru import LRU
from aioengine.schedulers.parts.none import NoPreemption
from aioengine.schedulers.policy import RequestView, SchedulerView


class Arrival(Ordering):
    """In order of arrival. Costs what it yields: nothing grows with the length of the queues."""

    starvation_bound = "those who arrived before it"
    source = "first come, first served"

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return request.arrival

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        in_order = merge(*map(view.waiting_for, names), key=lambda request: request.arrival)
        return list(islice(in_order, limit))

    def adapter_key(self, view: SchedulerView, name: str) -> float:
        oldest = view.adapters[name].oldest_arrival
        return float("inf") if oldest is None else oldest

    def cold(self, view: SchedulerView) -> Iterator[str]:
        return (n for n in view.waiting_adapters if n is not None and is_cold(view, n))


class FCFS(Composed):
    """Admit in arrival order whatever can run now; give slots to the adapters that wait longest.

    A cold adapter gets a free slot, or the least recently used idle one that nobody waits for. After
    ``max_wait`` seconds others make way for it; see :class:`~aioengine.schedulers.parts.compose.Composed`.

    Args:
        max_wait: Seconds that an adapter's oldest request waits before others make way for it.
    """

    source = "aioengine's own"
    starvation_bound = f"{SLOT_BOUND}; then {Arrival.starvation_bound}"

    def __init__(self, max_wait: float = 1.0) -> None:
        super().__init__(Arrival(), LRU(), Lookahead(), NoPreemption(), max_wait=max_wait)
