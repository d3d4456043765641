"""The order of arrival, in which many policies go through what waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import filterfalse
from operator import attrgetter
from typing import cast

from aioengine.schedulers.policy import RequestView, SchedulerView

_adapter = attrgetter("adapter")


def cold_by_arrival(view: SchedulerView) -> Iterator[str]:
    """Yield the cold adapters in the order of their oldest requests."""
    others = {None, *map(_adapter, view.slots)}
    return cast(Iterator[str], filterfalse(others.__contains__, view.waiting_adapters))


def by_arrival(view: SchedulerView, names: Iterable[str | None]) -> Iterator[RequestView]:
    """Yield the requests that wait for these adapters (None: the base model) in order of arrival."""
    return merge(*map(view.waiting_for, names), key=attrgetter("arrival"))
