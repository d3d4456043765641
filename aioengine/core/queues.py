"""Queues of waiting requests: all in order of arrival, and those of each adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sortedcontainers import SortedDict

from aioengine.core.arrival_queue import ArrivalQueue
from aioengine.core.state import AdapterEntry, Request
from aioengine.core.waiting_room import WaitingRoom


class RequestQueues:
    """All waiting requests, those of each adapter, and the adapters in order of their oldest one.

    Requests for a mix of several adapters are kept apart, because policies do not see them. Those for a
    scaled adapter wait among the others for it.

    Every change takes O(log n) time for n adapters that requests wait for, whatever the number of requests.
    """

    def __init__(self, room: WaitingRoom) -> None:
        self.room = room
        self.all: ArrivalQueue[Request] = ArrivalQueue()
        """Requests for the base model or one adapter."""
        self.mixes: SortedDict[int, AdapterEntry] = SortedDict()
        """Mixes of several that requests wait for, by the ``seq`` of the oldest one."""
        self.parts: dict[AdapterEntry, None] = {}
        """The adapters that these mixes are made of."""
        self._mixed = 0
        """Number of these requests."""
        self.base: ArrivalQueue[Request] = ArrivalQueue()
        self.heads: SortedDict[int, AdapterEntry | None] = SortedDict()
        """Adapters that requests wait for (None: the base model), by the ``seq`` of the oldest waiting
        request."""
        self._head_of: dict[int, int] = {}

    def queue_of(self, adapter: AdapterEntry | None) -> ArrivalQueue[Request]:
        return self.base if adapter is None else adapter.home.waiting

    def add(self, request: Request) -> None:
        if self._is_mixed(request.adapter):
            self._mixed += 1
        else:
            self.all.add(request)
        self.queue_of(request.adapter).add(request)
        self._reindex(request.adapter)

    def put_back(self, request: Request) -> None:
        self.room.returned += 1
        if self._is_mixed(request.adapter):
            self._mixed += 1
        else:
            self.all.put_back(request)
        self.queue_of(request.adapter).put_back(request)
        self._reindex(request.adapter)

    def remove(self, request: Request) -> None:
        if request.ticket is None:
            self.room.returned -= 1
        else:
            request.ticket.leave()
            request.ticket = None
        if self._is_mixed(request.adapter):
            self._mixed -= 1
        else:
            self.all.remove(request)
        self.queue_of(request.adapter).remove(request)
        self._reindex(request.adapter)

    @staticmethod
    def _is_mixed(adapter: AdapterEntry | None) -> bool:
        """Whether it is a mix of several adapters."""
        return adapter is not None and len(adapter.parts) > 1

    def _reindex(self, adapter: AdapterEntry | None) -> None:
        adapter = None if adapter is None else adapter.home
        uid = -1 if adapter is None else adapter.uid
        heads: SortedDict[int, Any] = self.mixes if self._is_mixed(adapter) else self.heads
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
        if heads is self.mixes and adapter is not None:
            for part in adapter.members:
                if part.waiting_mixes is None:
                    part.waiting_mixes = SortedDict()
                if old is not None:
                    del part.waiting_mixes[old]
                if head is not None:
                    part.waiting_mixes[head.seq] = adapter
                if part.waiting_mixes:
                    self.parts[part] = None
                else:
                    del self.parts[part]

    def check(self) -> None:
        found = {self.queue_of(adapter).head for adapter in self.heads.values()}
        assert {request.seq for request in found if request is not None} == set(self.heads)
        assert len(self.all) == sum(len(self.queue_of(a)) for a in self.heads.values())
        self.room.check()
        mixed = [request for mix in self.mixes.values() for request in mix.waiting]
        assert all(
            mix.waiting.head is not None and mix.waiting.head.seq == s for s, mix in self.mixes.items()
        )
        assert self._mixed == len(mixed)
        assert set(self.parts) == {part for mix in self.mixes.values() for part in mix.members}
        for part in self.parts:
            assert part.waiting_mixes == {s: mix for s, mix in self.mixes.items() if part in mix.members}
        assert self.room.returned == sum(request.ticket is None for request in self)

    def __iter__(self) -> Iterator[Request]:
        """Yield all requests; those for mixes come last."""
        yield from self.all
        for mix in self.mixes.values():
            yield from mix.waiting

    def by_adapter(self) -> dict[str | None, int]:
        """Return the numbers of requests by the names of what they wait for."""
        found: dict[str | None, int] = {}
        for entry in (*self.heads.values(), *self.mixes.values()):
            name = None if entry is None else entry.label
            found[name] = found.get(name, 0) + len(self.queue_of(entry))
        return found

    def __len__(self) -> int:
        return len(self.all) + self._mixed
