"""The order of arrival, in which many policies go through what waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import merge
from operator import attrgetter

from aioengine.schedulers.policy import RequestView, SchedulerView


def cold_by_arrival(view: SchedulerView) -> Iterator[str]:
    """Yield the cold adapters in the order of their oldest requests."""
    adapters = view.adapters
    return (name for name in view.waiting_adapters if name is not None and adapters[name].slot is None)


def by_arrival(view: SchedulerView, names: Iterable[str | None]) -> Iterator[RequestView]:
    """Yield the requests that wait for these adapters (None: the base model) in order of arrival."""
    return merge(*map(view.waiting_for, names), key=attrgetter("arrival"))
