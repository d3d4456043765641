"""Adapter clustering: few distinct adapters in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import merge
from itertools import islice, takewhile
from math import inf

from aioengine.schedulers.arrival import by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival
from aioengine.schedulers.policy import RequestView, SchedulerView


class SLoRA(Arrival):
    """Requests for the adapters of the running batch first, so that a batch has few distinct ones.

    The adapters of running requests are "in the batch". Requests for them, and for the base model, which does
    not count as an adapter, are admitted in order of arrival. Another adapter joins only when no request
    waits for an adapter in the batch, or when there is room left, and only while there are fewer than
    ``clusters``. It is the one whose request has waited longest. A request outside the batch that has waited
    ``age`` seconds brings its adapter in at once; if the batch is full, nothing that arrived later is
    admitted to the adapters in it until one of them has no request left.

    In the paper's system the batch is filled in order of arrival until it has ``clusters`` adapters and
    only then are those in it preferred, and others may still fill it up. Here they are always
    preferred, the number is never exceeded, and ``age`` bounds how long others are put off.

    Args:
        clusters: Maximum number of distinct adapters in a batch; 0: the number of slots.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = "Sheng et al. 2023, S-LoRA: Serving Thousands of Concurrent LoRA Adapters (adapter clustering)"
    starvation_bound = "age, those who arrived before it, and one longest generation"

    def __init__(self, clusters: int = 0, age: float = 5.0) -> None:
        at_least(0, clusters=clusters)
        at_least(0, "seconds", age=age)
        self.clusters = clusters
        self.age = age

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        adapters, able = view.adapters, set(names)
        batch = {request.adapter for request in view.running} - {None}
        room = (self.clusters or len(view.slots)) - len(batch)
        inside = [name for name in names if name is not None and name in batch]
        asked_for = any(adapters[name].waiting for name in inside)
        outside = (n for n in view.waiting_adapters if n is not None and n in able and n not in batch)
        last_arrival = inf
        head = next(outside, None)
        while head is not None and (not asked_for or self._aged(view, head)):
            if room <= 0:
                if self._aged(view, head):
                    last_arrival = adapters[head].oldest_arrival or 0.0
                break
            inside.append(head)
            head = next(outside, None)
            room -= 1
            asked_for = True

        due = takewhile(lambda r: r.arrival <= last_arrival, by_arrival(view, inside))
        base = view.waiting_for(None) if None in able else ()
        admit = list(islice(merge(base, due, key=lambda request: request.arrival), limit))
        while head is not None and room > 0 and len(admit) < limit:
            admit += islice(view.waiting_for(head), limit - len(admit))
            head = next(outside, None)
            room -= 1
        return admit

    def _aged(self, view: SchedulerView, name: str) -> bool:
        oldest = view.adapters[name].oldest_arrival
        return oldest is not None and view.now - oldest >= self.age
