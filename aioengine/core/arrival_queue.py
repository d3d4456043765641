"""A queue in order of arrival."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import merge
from typing import Generic, Protocol, TypeVar


class Numbered(Protocol):
    @property
    def seq(self) -> int:
        """Order of arrival."""

    @property
    def arrival(self) -> float: ...


T = TypeVar("T", bound=Numbered)


class ArrivalQueue(Generic[T]):
    """Requests in arrival order; adding a new one and removing any one are O(1).

    Preempted requests come back to a place in the middle. They are few (at most ``max_num_seqs``), so they
    are kept in a separate sorted list, which is merged in when the queue is read. (An OrderedDict finds its
    first key at once; a dict whose front was emptied has to look for it.)
    """

    __slots__ = ("_fresh", "_returned", "head", "oldest")

    def __init__(self) -> None:
        self._fresh: OrderedDict[int, T] = OrderedDict()
        self._returned: dict[int, T] = {}
        self.head: T | None = None
        """The first request; None if the queue is empty."""
        self.oldest: float | None = None
        """Its arrival."""

    def add(self, request: T) -> None:
        self._fresh[request.seq] = request
        if self.head is None:
            self._begin_with(request)

    def put_back(self, request: T) -> None:
        self._returned[request.seq] = request
        self._returned = dict(sorted(self._returned.items()))
        self._begin_with(next(iter(self)))

    def remove(self, request: T) -> None:
        if self._fresh.pop(request.seq, None) is None:
            del self._returned[request.seq]
        if request is self.head:
            self._begin_with(next(iter(self), None))

    def _begin_with(self, head: T | None) -> None:
        self.head, self.oldest = head, None if head is None else head.arrival

    def __len__(self) -> int:
        return len(self._fresh) + len(self._returned)

    def __iter__(self) -> Iterator[T]:
        if not self._returned:
            return iter(self._fresh.values())
        return merge(self._fresh.values(), self._returned.values(), key=lambda r: r.seq)
