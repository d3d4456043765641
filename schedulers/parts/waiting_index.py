"""Keeps waiting requests sorted by a custom key, so that no decision has to examine them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sortedcontainers import SortedList

from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class Entry(NamedTuple):
    """Entry that compares by key, then arrival; ``number`` is unique, so that requests are never compared."""

    key: Any
    arrival: float
    number: int
    request: RequestView


class WaitingIndex:
    """The waiting requests by adapter, in order of (key, arrival).

    Fed by ``on_event``; a change costs O(log waiting). Where the view knows another number of waiting
    requests for an adapter than the events told (the policy came late, or a version was superseded and
    its queue renamed), the adapter's requests are read anew.

    Args:
        key: Must not change while a request waits.
    """

    def __init__(self, key: Callable[[RequestView], Any]) -> None:
        self._key = key
        self._queues: dict[str | None, SortedList[Entry]] = {}
        """Entries by adapter; none is empty."""
        self._where: dict[str, tuple[str | None, Entry]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._where)

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if request is None:
            return
        if event.kind in ("request_added", "request_preempted"):
            self._remove(request.request_id)
            self._add(request.adapter, request)
        elif event.kind in ("request_admitted", "request_finished"):
            self._remove(request.request_id)

    def in_order(self, view: SchedulerView, adapter: str | None) -> Iterator[Entry]:
        """Yield the requests that wait for ``adapter``, in order."""
        waiting = view.waiting_for(adapter)
        if len(waiting) != len(self._queues.get(adapter, ())):
            for entry in list(self._queues.get(adapter, ())):
                self._remove(entry.request.request_id)
            for request in waiting:
                self._remove(request.request_id)
                self._add(adapter, request)
        return iter(self._queues.get(adapter, ()))

    def _add(self, adapter: str | None, request: RequestView) -> None:
        entry = Entry(self._key(request), request.arrival, self._count, request)
        self._count += 1
        self._queues.setdefault(adapter, SortedList()).add(entry)
        self._where[request.request_id] = (adapter, entry)

    def _remove(self, request_id: str) -> None:
        found = self._where.pop(request_id, None)
        if found is None:
            return
        adapter, entry = found
        queue = self._queues[adapter]
        queue.remove(entry)
        if not queue:
            del self._queues[adapter]
