"""Base of the orderings whose key does not change while a request waits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from heapq import merge
from itertools import islice
from typing import Any

from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.parts.waiting_index import WaitingIndex
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class FixedKeyOrdering(Ordering):
    """Smallest ``fixed_key`` first, equal ones in order of arrival. The cost of a decision grows with what it
    admits, because the waiting requests are kept sorted."""

    def __init__(self) -> None:
        self._index = WaitingIndex(self.fixed_key)

    @abstractmethod
    def fixed_key(self, request: RequestView) -> Any:
        """Must not change while the request waits."""

    def key(self, request: RequestView, view: SchedulerView) -> Any:
        return self.fixed_key(request)

    def on_event(self, event: PolicyEvent) -> None:
        self._index.on_event(event)

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        in_order = merge(*(self._index.in_order(view, name) for name in names))
        return [entry.request for entry in islice(in_order, limit)]

    def adapter_key(self, view: SchedulerView, name: str) -> Any:
        first = next(self._index.in_order(view, name))
        return first.key, first.arrival
