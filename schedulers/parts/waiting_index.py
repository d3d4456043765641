"""Keeps waiting requests sorted by a custom key, so that no decision has to examine them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from sortedcontainers import SortedList

from aioengine.schedulers.parts.lazy_merge import lazy_merge
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class Entry(NamedTuple):
    """Entry that compares by key, then arrival; ``number`` is unique, so that requests are never compared."""

    key: Any
    arrival: float
    number: int
    request: RequestView


class WaitingIndex:
    """The waiting requests by adapter, in order of (key, arrival), and the adapters in order of their first.

    Fed by ``on_event``; a change costs O(log waiting). ``sync`` reads everything again if the policy has
    missed events.

    Args:
        key: Must not change while a request waits.
    """

    def __init__(self, key: Callable[[RequestView], Any]) -> None:
        self._key = key
        self._count = 0
        self._clear()

    def _clear(self) -> None:
        self._queues: dict[str | None, SortedList[Entry]] = {}
        """Entries by adapter; none is empty."""
        self._where: dict[str, tuple[str | None, Entry]] = {}
        self._heads: SortedList[tuple[Entry, str | None]] = SortedList(key=lambda head: _place(head[0]))
        """The first entry of each queue."""

    def __len__(self) -> int:
        return len(self._where)

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if request is None:
            if event.kind == "adapter_retired":
                self.rename(event.was, event.adapter)
        elif event.kind in ("request_added", "request_preempted"):
            self.add(request)
        elif event.kind in ("request_admitted", "request_finished"):
            self.remove(request.request_id)

    def sync(self, view: SchedulerView) -> None:
        """Call before a decision. What waits here waits there, too; so if the numbers agree, all do."""
        if len(self) != len(view.waiting):
            self._clear()
            for request in view.waiting:
                self.add(request)

    def heads(self) -> Iterator[tuple[Entry, str | None]]:
        """Yield (first entry, adapter), in order."""
        return iter(self._heads)

    def in_order(self, adapters: Collection[str | None]) -> Iterator[RequestView]:
        """Return the requests that wait for these adapters, in order. Lazy."""
        wanted = adapters if isinstance(adapters, set | frozenset) else set(adapters)
        queues = (self._queues[adapter] for _, adapter in self._heads if adapter in wanted)
        return (entry.request for entry in lazy_merge(queues, _place))

    def add(self, request: RequestView) -> None:
        self.remove(request.request_id)
        entry = Entry(self._key(request), request.arrival, self._count, request)
        self._count += 1
        self._insert(entry, request.adapter)

    def _insert(self, entry: Entry, adapter: str | None) -> None:
        self._where[entry.request.request_id] = (adapter, entry)
        queue = self._queues.get(adapter)
        if queue is None:
            queue = self._queues[adapter] = SortedList()
        elif entry < queue[0]:
            self._heads.remove((queue[0], adapter))
        else:
            queue.add(entry)
            return
        queue.add(entry)
        self._heads.add((entry, adapter))

    def remove(self, request_id: str) -> RequestView | None:
        """Remove a request and return it; None if it is not there."""
        found = self._where.pop(request_id, None)
        if found is None:
            return None
        adapter, entry = found
        queue = self._queues[adapter]
        first = queue[0]
        queue.remove(entry)
        if first is entry:
            self._heads.remove((first, adapter))
            if queue:
                self._heads.add((queue[0], adapter))
        if not queue:
            del self._queues[adapter]
        return entry.request

    def rename(self, was: str | None, adapter: str | None) -> None:
        """Follow an adapter that is called otherwise from now on."""
        for entry in list(self._queues.get(was, ())):
            self.remove(entry.request.request_id)
            self._insert(entry, adapter)


def _place(entry: Entry) -> tuple[Any, float, int]:
    return entry[:3]
