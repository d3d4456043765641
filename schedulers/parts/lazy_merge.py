"""Merges queues of waiting requests, and opens no more of them than it has to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from heapq import heappop, heappush, heapreplace
from typing import Any, TypeVar

from aioengine.schedulers.policy import RequestView, SchedulerView

T = TypeVar("T")
SORTED = 4
"""So many times as many adapters are looked through as are sorted in the same time."""


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
    """Yield the requests that wait for these adapters (None: the base model), in order of arrival.

    The cost grows with the number of these adapters, or of those that requests wait for, whichever is less.
    """
    wanted = names if isinstance(names, set | frozenset) else set(names)
    in_order: Iterable[str | None] | None = None
    if len(wanted) * SORTED < len(view.waiting_adapters):
        in_order = _by_first(view, wanted)
    if in_order is None:
        in_order = (name for name in view.waiting_adapters if name in wanted)
    return lazy_merge(map(view.waiting_for, in_order), arrival)


def _by_first(view: SchedulerView, names: Iterable[str | None]) -> Sequence[str | None] | None:
    """Sort these adapters by the arrival of their first waiting requests, those without any left out. None if
    two of these arrived at the same time: then only ``view.waiting_adapters`` has their order."""
    firsts: dict[float, str | None] = {}
    count, known = 0, view.adapters
    for name in names:
        if name is None:
            base = next(iter(view.waiting_for(None)), None)
            first = None if base is None else base.arrival
        else:
            adapter = known.get(name)
            first = None if adapter is None else adapter.oldest_arrival
        if first is not None:
            firsts[first] = name
            count += 1
    return [firsts[first] for first in sorted(firsts)] if len(firsts) == count else None


def arrival(request: RequestView) -> float:
    """Return the time at which a request arrived."""
    return request.arrival
