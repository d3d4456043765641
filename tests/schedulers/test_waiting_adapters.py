"""What a decision costs does not grow with the adapters that are waited for, and it is the same decision."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aioengine.schedulers.parts.lazy_merge import by_arrival

queues = st.dictionaries(
    st.sampled_from([None, *(f"a{number}" for number in range(40))]),
    st.lists(st.integers(0, 60), min_size=1, max_size=3).map(sorted),
    max_size=40,
)
"""Arrivals of the requests that wait, by adapter, in tenths of seconds."""


class Waiting:
    """A view of these queues."""

    def __init__(self, queues: dict[str | None, list[int]], now: float = 6.0) -> None:
        self.now, self.queues = now, queues
        self.memory = SimpleNamespace(shared=False)
        self.adapters = {
            name: SimpleNamespace(oldest_arrival=times[0] / 10)
            for name, times in queues.items()
            if name is not None
        }
        self.waiting_adapters: list[str | None] = sorted(queues, key=lambda name: queues[name][0])
        self.looked_at = 0

    def waiting_for(self, name: str | None) -> Iterator[Any]:
        self.looked_at += 1
        return iter([SimpleNamespace(arrival=time / 10, adapter=name) for time in self.queues.get(name, ())])


@given(queues, st.sets(st.sampled_from([None, *(f"a{number}" for number in range(40))]), max_size=12))
def test_requests_are_merged_in_the_same_order_whichever_way_is_taken(
    queues: dict[str | None, list[int]], names: set[str | None]
) -> None:
    view: Any = Waiting(queues)
    found = [(request.arrival, request.adapter) for request in by_arrival(view, names)]
    place = {name: number for number, name in enumerate(view.waiting_adapters)}
    every = [(time / 10, place[name], name) for name in names & queues.keys() for time in queues[name]]
    assert found == [(time, name) for time, _, name in sorted(every, key=lambda item: item[:2])]


def test_of_many_adapters_only_those_that_can_run_are_looked_at() -> None:
    view: Any = Waiting({f"a{number}": [number] for number in range(40)})
    assert len(list(by_arrival(view, {"a7", "a3", "b"}))) == 2
    assert view.looked_at <= 6
