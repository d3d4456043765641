"""Queues of waiting requests: all in order of arrival, and those of each adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

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
        self._change(request, ArrivalQueue.add)

    def put_back(self, request: Request) -> None:
        self.room.returned += 1
        self._change(request, ArrivalQueue.put_back)

    def remove(self, request: Request) -> None:
        if request.reservation is None:
            self.room.returned -= 1
        else:
            request.reservation.leave()
            request.reservation = None
        self._change(request, ArrivalQueue.remove)

    def _change(self, request: Request, change: Callable[[ArrivalQueue, Request], None]) -> None:
        """Change the queue of all requests and that of its adapter, whose head may be another one then."""
        change(self.all, request)
        queue = self.queue_of(request.adapter)
        before = queue.head
        change(queue, request)
        if queue.head is not before:
            if before is not None:
                del self.heads[before.seq]
            if queue.head is not None:
                self.heads[queue.head.seq] = request.adapter

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
