"""Waiting requests kept sorted by a key of one's own, so that no decision has to look at them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from sortedcontainers import SortedList

from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class Entry(NamedTuple):
    """Compares by key, then arrival; ``number`` is unique, so that requests are never compared."""

    key: Any
    arrival: float
    number: int
    request: RequestView


class WaitingIndex:
    """By adapter, and within it by group: the waiting requests in order of (key, arrival).

    Fed by ``on_event``; a change costs O(log waiting). Where the view knows another number of waiting
    requests for an adapter than the events told (the policy came late, or a version was superseded and
    its queue renamed), the adapter's requests are read anew.

    Args:
        key: Must not change while a request waits.
        group: As above.
    """

    def __init__(
        self,
        key: Callable[[RequestView], Any],
        group: Callable[[RequestView], Hashable] = lambda request: None,
    ) -> None:
        self._key, self._group = key, group
        self._queues: dict[str | None, dict[Any, SortedList[Entry]]] = {}
        self._sizes: dict[str | None, int] = {}
        self._where: dict[str, tuple[str | None, Any, Entry]] = {}
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

    def groups(self, view: SchedulerView, adapter: str | None) -> Mapping[Any, SortedList[Entry]]:
        """The requests that wait for ``adapter`` by group; no group is empty."""
        waiting = view.waiting_for(adapter)
        if len(waiting) != self._sizes.get(adapter, 0):
            for queue in list(self._queues.get(adapter, {}).values()):
                for entry in list(queue):
                    self._remove(entry.request.request_id)
            for request in waiting:
                self._remove(request.request_id)
                self._add(adapter, request)
        return self._queues.get(adapter, {})

    def in_order(self, view: SchedulerView, adapter: str | None) -> Iterator[Entry]:
        """The requests that wait for ``adapter``, if there is only one group."""
        for queue in self.groups(view, adapter).values():
            return iter(queue)
        return iter(())

    def _add(self, adapter: str | None, request: RequestView) -> None:
        entry = Entry(self._key(request), request.arrival, self._count, request)
        self._count += 1
        group = self._group(request)
        self._queues.setdefault(adapter, {}).setdefault(group, SortedList()).add(entry)
        self._sizes[adapter] = self._sizes.get(adapter, 0) + 1
        self._where[request.request_id] = (adapter, group, entry)

    def _remove(self, request_id: str) -> None:
        found = self._where.pop(request_id, None)
        if found is None:
            return
        adapter, group, entry = found
        queue = self._queues[adapter][group]
        queue.remove(entry)
        self._sizes[adapter] -= 1
        if not queue:
            del self._queues[adapter][group]
            if not self._queues[adapter]:
                del self._queues[adapter]
                del self._sizes[adapter]
