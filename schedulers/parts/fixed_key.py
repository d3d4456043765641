"""Orderings whose key does not change while a request waits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from sortedcontainers import SortedList

from aioengine.schedulers.parts.base import Ordering, is_cold
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class _Entry(NamedTuple):
    """A waiting request; ``number`` is unique, so that requests are never compared."""

    key: Any
    arrival: float
    number: int
    request: RequestView


class SortedRequests:
    """The waiting requests in the order of their keys, equal ones by arrival.

    Args:
        key: Must not change while a request waits.
    """

    def __init__(self, key: Callable[[RequestView], Any]) -> None:
        self._key = key
        self._count = 0
        self._sorted: SortedList[_Entry] = SortedList()
        self._entries: dict[str, _Entry] = {}

    def on_event(self, event: PolicyEvent) -> None:
        if event.request is None:
            return
        if event.kind in ("request_added", "request_preempted"):
            self._add(event.request)
        elif (entry := self._entries.pop(event.request.request_id, None)) is not None:
            self._sorted.remove(entry)

    def in_order(self, view: SchedulerView) -> Iterator[RequestView]:
        """Yield the requests; all are read again if events were missed, so that the numbers differ."""
        if len(self._entries) != len(view.waiting):
            self._sorted.clear()
            self._entries.clear()
            for request in view.waiting:
                self._add(request)
        return (entry.request for entry in self._sorted)

    def _add(self, request: RequestView) -> None:
        self._count += 1
        entry = _Entry(self._key(request), request.arrival, self._count, request)
        self._entries[request.request_id] = entry
        self._sorted.add(entry)


class FixedKeyOrdering(Ordering):
    """Smallest ``fixed_key`` first, equal ones in order of arrival."""

    def __init__(self) -> None:
        self._requests = SortedRequests(self.fixed_key)

    @abstractmethod
    def fixed_key(self, request: RequestView) -> Any:
        """Return the sort key, which must not change while the request waits."""

    def key(self, request: RequestView, view: SchedulerView) -> Any:
        return self.fixed_key(request)

    def on_event(self, event: PolicyEvent) -> None:
        self._requests.on_event(event)

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        able = set(names)
        return list(islice((r for r in self._requests.in_order(view) if r.adapter in able), limit))

    def cold(self, view: SchedulerView) -> Iterator[str]:
        seen: set[str | None] = {None}
        for request in self._requests.in_order(view):
            name = request.adapter
            if name not in seen:
                seen.add(name)
                if name is not None and is_cold(view, name):
                    yield name
