"""Order of arrival: the ordering that others are derived from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import inf

from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.policies.fcfs import by_arrival, cold_by_arrival
from aioengine.schedulers.policy import RequestView, SchedulerView


class Arrival(Ordering):
    """Order of arrival. The cost does not grow with the length of the queues."""

    starvation_bound = "those who arrived before it"
    source = "first come, first served"

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return request.arrival

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        return list(islice(by_arrival(view, names), limit))

    def adapter_key(self, view: SchedulerView, name: str) -> float:
        oldest = view.adapters[name].oldest_arrival
        return inf if oldest is None else oldest

    def cold(self, view: SchedulerView) -> Iterator[str]:
        return cold_by_arrival(view)
