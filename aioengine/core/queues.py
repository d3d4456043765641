"""Request queues in arrival order: one over all waiting requests, and one for each adapter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import merge
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioengine.core.state import AdapterEntry, Request


class ArrivalQueue:
    """Requests in arrival order; adding a new one and removing any one are O(1).

    Preempted requests come back to a place in the middle. They are few (at most ``max_num_seqs``), so
    they are kept apart, sorted, and merged in when the queue is read. (An OrderedDict finds its first
    key at once; a dict whose front was emptied has to look for it.)
    """

    __slots__ = ("_fresh", "_returned")

    def __init__(self) -> None:
        self._fresh: OrderedDict[int, Request] = OrderedDict()
        self._returned: dict[int, Request] = {}

    def add(self, request: Request) -> None:
        self._fresh[request.seq] = request

    def put_back(self, request: Request) -> None:
        self._returned[request.seq] = request
        self._returned = dict(sorted(self._returned.items()))

    def remove(self, request: Request) -> None:
        if self._fresh.pop(request.seq, None) is None:
            del self._returned[request.seq]

    @property
    def head(self) -> Request | None:
        return next(iter(self), None)

    def __len__(self) -> int:
        return len(self._fresh) + len(self._returned)

    def __iter__(self) -> Iterator[Request]:
        if not self._returned:
            return iter(self._fresh.values())
        return merge(self._fresh.values(), self._returned.values(), key=lambda r: r.seq)


class RequestQueues:
    """All waiting requests, indexed by adapter; keeps both indexes in step."""

    def __init__(self) -> None:
        self.all = ArrivalQueue()
        self.base = ArrivalQueue()
        self.adapters: dict[int, AdapterEntry] = {}
        """Entries that have waiting requests, by uid."""

    def queue_of(self, adapter: AdapterEntry | None) -> ArrivalQueue:
        return self.base if adapter is None else adapter.waiting

    def add(self, request: Request) -> None:
        self.all.add(request)
        self.queue_of(request.adapter).add(request)
        self._index(request.adapter)

    def put_back(self, request: Request) -> None:
        self.all.put_back(request)
        self.queue_of(request.adapter).put_back(request)
        self._index(request.adapter)

    def remove(self, request: Request) -> None:
        self.all.remove(request)
        self.queue_of(request.adapter).remove(request)
        if request.adapter is not None and not request.adapter.waiting:
            del self.adapters[request.adapter.uid]

    def _index(self, adapter: AdapterEntry | None) -> None:
        if adapter is not None:
            self.adapters[adapter.uid] = adapter

    def __len__(self) -> int:
        return len(self.all)
