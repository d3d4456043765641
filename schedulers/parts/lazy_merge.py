"""Merges queues of waiting requests, and opens no more of them than it has to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from heapq import heappop, heappush, heapreplace
from typing import Any, TypeVar

from aioengine.schedulers.policy import RequestView, SchedulerView

T = TypeVar("T")


def lazy_merge(queues: Iterable[Iterable[T]], key: Callable[[T], Any]) -> Iterator[T]:
    """Merge sorted queues that come in the order of their first items, as ``heapq.merge`` would.

    A queue is opened when its first item is the next. So the cost grows with the number of items that are
    taken, and not with the number of queues.
    """
    opened: list[tuple[Any, int, T, Iterator[T]]] = []
    for number, queue in enumerate(queues):
        items = iter(queue)
        for item in items:
            rank = key(item)
            while opened and opened[0][0] <= rank:
                yield _next(opened, key)
            heappush(opened, (rank, number, item, items))
            break
    while opened:
        yield _next(opened, key)


def _next(opened: list[tuple[Any, int, T, Iterator[T]]], key: Callable[[T], Any]) -> T:
    _, number, first, items = opened[0]
    for item in items:
        heapreplace(opened, (key(item), number, item, items))
        return first
    heappop(opened)
    return first


def by_arrival(view: SchedulerView, names: Collection[str | None]) -> Iterator[RequestView]:
    """Yield the requests that wait for these adapters (None: the base model), in order of arrival."""
    wanted = names if isinstance(names, set | frozenset) else set(names)
    queues = (view.waiting_for(name) for name in view.waiting_adapters if name in wanted)
    return lazy_merge(queues, arrival)


def arrival(request: RequestView) -> float:
    """Return the time at which a request arrived."""
    return request.arrival
