"""Queues of waiting requests: all in order of arrival, and those of each adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sortedcontainers import SortedDict

from aioengine.core.state import AdapterEntry, ArrivalQueue, Request
from aioengine.core.waiting_room import WaitingRoom


class RequestQueues:
    """All waiting requests, those of each adapter, and the adapters in order of their oldest one.

    Every change takes O(log n) time for n adapters that requests wait for, whatever the number of requests.
    """

    def __init__(self, room: WaitingRoom) -> None:
        self.room = room
        self.all: ArrivalQueue = ArrivalQueue()
        self.base: ArrivalQueue = ArrivalQueue()
        self.heads: SortedDict[int, AdapterEntry | None] = SortedDict()
        """Adapters that requests wait for (None: the base model), by the ``seq`` of the oldest waiting
        request."""

    def queue_of(self, adapter: AdapterEntry | None) -> ArrivalQueue:
        return self.base if adapter is None else adapter.waiting

    def add(self, request: Request) -> None:
        self.all.add(request)
        queue = self.queue_of(request.adapter)
        queue.add(request)
        if queue.head is request:
            self.heads[request.seq] = request.adapter

    def put_back(self, request: Request) -> None:
        self.room.returned += 1
        self.all.put_back(request)
        queue = self.queue_of(request.adapter)
        before = queue.head
        queue.put_back(request)
        self._move_head(request.adapter, before)

    def remove(self, request: Request) -> None:
        if request.reservation is None:
            self.room.returned -= 1
        else:
            request.reservation.leave()
            request.reservation = None
        self.all.remove(request)
        queue = self.queue_of(request.adapter)
        before = queue.head
        queue.remove(request)
        self._move_head(request.adapter, before)

    def _move_head(self, adapter: AdapterEntry | None, before: Request | None) -> None:
        """Note that a queue's head may be another than ``before``."""
        head = self.queue_of(adapter).head
        if head is not before:
            if before is not None:
                del self.heads[before.seq]
            if head is not None:
                self.heads[head.seq] = adapter

    def check(self) -> None:
        found = {self.queue_of(adapter).head for adapter in self.heads.values()}
        assert {request.seq for request in found if request is not None} == set(self.heads)
        assert len(self.all) == sum(len(self.queue_of(a)) for a in self.heads.values())
        self.room.check()
        assert self.room.returned == sum(request.reservation is None for request in self)

    def __iter__(self) -> Iterator[Request]:
        """Yield all requests in order of arrival."""
        return iter(self.all)

    def by_adapter(self) -> dict[str | None, int]:
        """Return the numbers of requests by the names of what they wait for."""
        found: Counter[str | None] = Counter()
        for entry in self.heads.values():
            found[None if entry is None else entry.label] += len(self.queue_of(entry))
        return dict(found)

    def __len__(self) -> int:
        return len(self.all)
