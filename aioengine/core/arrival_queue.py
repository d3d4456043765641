"""A queue in order of arrival."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import takewhile
from typing import Generic, Protocol, TypeVar


class Numbered(Protocol):
    @property
    def seq(self) -> int:
        """Order of arrival."""

    @property
    def arrival(self) -> float: ...


T = TypeVar("T", bound=Numbered)


class ArrivalQueue(Generic[T]):
    """Requests in arrival order; adding a new one and removing any one are O(1). (An OrderedDict finds its
    first key at once; a dict whose front was emptied has to look for it.)"""

    __slots__ = ("_requests", "head", "oldest")

    def __init__(self) -> None:
        self._requests: OrderedDict[int, T] = OrderedDict()
        self.head: T | None = None
        """The first request; None if the queue is empty."""
        self.oldest: float | None = None
        """Its arrival."""

    def add(self, request: T) -> None:
        self._requests[request.seq] = request
        if self.head is None:
            self._find_head()

    def put_back(self, request: T) -> None:
        """Add a preempted request. It is older than most, so its place is found from the front."""
        older = list(takewhile(request.seq.__gt__, self._requests))
        self._requests[request.seq] = request
        for seq in (request.seq, *reversed(older)):
            self._requests.move_to_end(seq, last=False)
        self._find_head()

    def remove(self, request: T) -> None:
        del self._requests[request.seq]
        if request is self.head:
            self._find_head()

    def _find_head(self) -> None:
        self.head = head = next(iter(self), None)
        self.oldest = None if head is None else head.arrival

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[T]:
        return iter(self._requests.values())
