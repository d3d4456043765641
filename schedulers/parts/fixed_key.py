"""Base of the orderings whose key does not change while a request waits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from aioengine.schedulers.parts.base import Ordering, is_cold
from aioengine.schedulers.parts.waiting_index import WaitingIndex
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class FixedKeyOrdering(Ordering):
    """Smallest ``fixed_key`` first, equal ones in order of arrival. The waiting requests are kept sorted, so
    the cost of a decision grows only with the number of admitted requests."""

    def __init__(self) -> None:
        self._index = WaitingIndex(self.fixed_key)

    @abstractmethod
    def fixed_key(self, request: RequestView) -> Any:
        """Return the sort key, which must not change while the request waits."""

    def key(self, request: RequestView, view: SchedulerView) -> Any:
        return self.fixed_key(request)

    def on_event(self, event: PolicyEvent) -> None:
        self._index.on_event(event)

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        self._index.sync(view)
        return list(islice(self._index.in_order(names), limit))

    def cold(self, view: SchedulerView) -> Iterator[str]:
        self._index.sync(view)
        return (name for _, name in self._index.heads() if name is not None and is_cold(view, name))
