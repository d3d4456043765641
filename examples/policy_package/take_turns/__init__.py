"""Two parts for aioengine's policies, an order and an eviction, which are found by their entry points.

pip install examples/policy_package
aioengine generate --policy take_turns+longest_idle ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from aioengine.schedulers import (
    AdapterView,
    Ordering,
    Replacement,
    RequestView,
    SchedulerView,
    SlotView,
)


class TakeTurns(Ordering):
    """Order that takes one request of each adapter in turn, first of the adapters with the fewest running
    requests."""

    source = "the tutorial in docs/policies.md, as a part"
    starvation_bound = "as many turns as requests of its own adapter came before it"

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return request.arrival

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        return [request for _, request in zip(range(limit), self._turns(view, names), strict=False)]

    @staticmethod
    def _turns(view: SchedulerView, names: Sequence[str | None]) -> Iterator[RequestView]:
        running = Counter(request.adapter for request in view.running)
        queues = [iter(view.waiting_for(name)) for name in sorted(names, key=lambda n: running[n])]
        while queues:
            for queue in list(queues):
                request = next(queue, None)
                if request is None:
                    queues.remove(queue)
                else:
                    yield request


class LongestIdle(Replacement):
    """Eviction of the adapter whose slot has been idle longest; of equally old ones, the smaller first.

    Args:
        per_megabyte: Seconds of age that one megabyte of size counts as.
    """

    source = "an example"

    def __init__(self, per_megabyte: float = 0.1) -> None:
        if per_megabyte < 0:
            raise ValueError(f"per_megabyte={per_megabyte}: must be >= 0")
        self.per_megabyte = per_megabyte

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return slot.last_used + self.per_megabyte * adapter.bytes / 1e6
