"""Request queues in arrival order: one over all waiting requests, and one for each adapter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import merge
from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

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
    """All waiting requests, those of each adapter, and the adapters in order of their oldest one.

    Every change costs O(log adapters that are waited for), whatever the number of requests.
    """

    def __init__(self) -> None:
        self.all = ArrivalQueue()
        self.base = ArrivalQueue()
        self.heads: SortedDict[int, AdapterEntry | None] = SortedDict()
        """By the ``seq`` of its oldest waiting request: each adapter waited for (None: the base model)."""
        self._head_of: dict[int, int] = {}

    def queue_of(self, adapter: AdapterEntry | None) -> ArrivalQueue:
        return self.base if adapter is None else adapter.waiting

    def add(self, request: Request) -> None:
        self.all.add(request)
        self.queue_of(request.adapter).add(request)
        self._reindex(request.adapter)

    def put_back(self, request: Request) -> None:
        self.all.put_back(request)
        self.queue_of(request.adapter).put_back(request)
        self._reindex(request.adapter)

    def remove(self, request: Request) -> None:
        self.all.remove(request)
        self.queue_of(request.adapter).remove(request)
        self._reindex(request.adapter)

    def _reindex(self, adapter: AdapterEntry | None) -> None:
        uid = -1 if adapter is None else adapter.uid
        head = self.queue_of(adapter).head
        old = self._head_of.get(uid)
        if head is not None and head.seq == old:
            return
        if old is not None:
            del self.heads[old]
            del self._head_of[uid]
        if head is not None:
            self.heads[head.seq] = adapter
            self._head_of[uid] = head.seq

    def check(self) -> None:
        found = {self.queue_of(adapter).head for adapter in self.heads.values()}
        assert {request.seq for request in found if request is not None} == set(self.heads)
        assert len(self.all) == sum(len(self.queue_of(a)) for a in self.heads.values())

    def __len__(self) -> int:
        return len(self.all)
