"""First come, first served, with ageing: the default policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.parts.compose import SLOT_BOUND, Composed
from aioengine.schedulers.parts.lazy_merge import by_arrival
from aioengine.schedulers.parts.lookahead import Lookahead
from aioengine.schedulers.parts.lru import LRU
from aioengine.schedulers.parts.none import NoPreemption
from aioengine.schedulers.policy import RequestView, SchedulerView


class Arrival(Ordering):
    """Order of arrival. The cost does not grow with the length of the queues."""

    by_events = by_oldest = True
    starvation_bound = "those who arrived before it"
    source = "first come, first served"

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return request.arrival

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        return list(islice(by_arrival(view, names), limit))

    def adapter_key(self, view: SchedulerView, name: str) -> float:
        oldest = view.adapters[name].oldest_arrival
        return float("inf") if oldest is None else oldest

    def cold(self, view: SchedulerView) -> Iterator[str]:
        adapters = view.adapters
        return (n for n in view.waiting_adapters if n is not None and adapters[n].slot is None)


class FairArrival(Arrival):
    """Order of arrival among the requests of a tenant, and equal shares between tenants.

    The next request admitted is the oldest of the tenant that has the fewest running; the next adapter
    brought in is one of the tenant that has the fewest slots. Requests without a tenant count as one tenant.
    See :mod:`aioengine.schedulers.parts.shares`.

    Bound, while there are no more tenants than sequences and slots: a tenant with one request waits for the
    step under way, for one read or copy under way, for twice the steps to compute the last preempted tokens
    again, and for the chunks of one longest prompt. Then it runs to its end.
    """

    by_events = by_oldest = True
    sharing = "equal"
    starvation_bound = (
        "those of its tenant who arrived before it; other tenants, while its own has less than its share, "
        "only for a step, a read and one longest prompt"
    )


class FCFS(Composed):
    """Admits requests that can run now, in order of arrival, and gives slots to the adapters that wait
    longest.

    A cold adapter gets a free slot, or the least recently used idle slot that no request waits for. After
    ``max_wait`` seconds other adapters make way for it; see
    :class:`~aioengine.schedulers.parts.compose.Composed`. Where several tenants have requests, they have
    equal shares: see :class:`FairArrival`.

    Args:
        max_wait: Seconds that an adapter's oldest request waits before others make way for it.
        fair: Whether tenants have shares; if not, all requests count as one tenant's.
    """

    source = "aioengine's own"
    starvation_bound = f"{SLOT_BOUND}; then {FairArrival.starvation_bound}"

    def __init__(self, max_wait: float = 1.0, fair: bool = True) -> None:
        order = FairArrival() if fair else Arrival()
        super().__init__(order, LRU(), Lookahead(), NoPreemption(), max_wait=max_wait)
