"""Queues of waiting requests: all in order of arrival, and those of each adapter."""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedDict

from aioengine.core.arrival_queue import ArrivalQueue
from aioengine.core.state import AdapterEntry, Request
from aioengine.core.waiting_room import WaitingRoom


class RequestQueues:
    """All waiting requests, those of each adapter, and the adapters in order of their oldest one.

    Every change takes O(log n) time for n adapters that requests wait for, whatever the number of requests.
    """

    def __init__(self, room: WaitingRoom) -> None:
        self.room = room
        self.all: ArrivalQueue[Request] = ArrivalQueue()
        self.base: ArrivalQueue[Request] = ArrivalQueue()
        self.heads: SortedDict[int, AdapterEntry | None] = SortedDict()
        """Adapters that requests wait for (None: the base model), by the ``seq`` of the oldest waiting
        request."""
        self._head_of: dict[int, int] = {}

    def queue_of(self, adapter: AdapterEntry | None) -> ArrivalQueue[Request]:
        return self.base if adapter is None else adapter.waiting

    def add(self, request: Request) -> None:
        self.all.add(request)
        self.queue_of(request.adapter).add(request)
        self._reindex(request.adapter)

    def put_back(self, request: Request) -> None:
        self.room.returned += 1
        self.all.put_back(request)
        self.queue_of(request.adapter).put_back(request)
        self._reindex(request.adapter)

    def remove(self, request: Request) -> None:
        if request.ticket is None:
            self.room.returned -= 1
        else:
            request.ticket.leave()
            request.ticket = None
        self.all.remove(request)
        self.queue_of(request.adapter).remove(request)
        self._reindex(request.adapter)

    def _reindex(self, adapter: AdapterEntry | None) -> None:
        uid, heads = -1 if adapter is None else adapter.uid, self.heads
        head = self.queue_of(adapter).head
        old = self._head_of.get(uid)
        if head is not None and head.seq == old:
            return
        if old is not None:
            del heads[old]
            del self._head_of[uid]
        if head is not None:
            heads[head.seq] = adapter
            self._head_of[uid] = head.seq

    def check(self) -> None:
        found = {self.queue_of(adapter).head for adapter in self.heads.values()}
        assert {request.seq for request in found if request is not None} == set(self.heads)
        assert len(self.all) == sum(len(self.queue_of(a)) for a in self.heads.values())
        self.room.check()
        assert self.room.returned == sum(request.ticket is None for request in self)

    def __iter__(self) -> Iterator[Request]:
        """Yield all requests in order of arrival."""
        return iter(self.all)

    def by_adapter(self) -> dict[str | None, int]:
        """Return the numbers of requests by the names of what they wait for."""
        found: dict[str | None, int] = {}
        for entry in self.heads.values():
            name = None if entry is None else entry.label
            found[name] = found.get(name, 0) + len(self.queue_of(entry))
        return found

    def __len__(self) -> int:
        return len(self.all)
