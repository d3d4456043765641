"""Rank-aware: requests that add the least to a step's time go first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile

from aioengine.schedulers.arrival import by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival
from aioengine.schedulers.policy import RequestView, SchedulerView


class Toppings(Arrival):
    """Requests in the order of the time that their adapter adds to the step: those for adapters in the batch
    and of low ranks first.

    A step waits for its largest rank, so one request for a large adapter makes all others slower.
    ``view.costs`` gives the time that each adapter would add: the time of a step with one more request and
    the ranks that it would then have, minus the time of the present step. Equal requests go in order of
    arrival. With ``max_step``, no request is admitted that would make a step longer than that, unless nothing
    runs.

    The paper's system chooses between servers: a request goes to the server where it adds the least to a
    step, within its objective. Here it is the order within one engine.

    Args:
        max_step: Maximum seconds of a decoding step; 0: no limit.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = "Li et al. 2025, Toppings: CPU-Assisted, Rank-Aware Adapter Serving for LLM Inference (ATC'25)"
    starvation_bound = "age, those who arrived before it, and one longest generation"

    def __init__(self, max_step: float = 0.0, age: float = 5.0) -> None:
        at_least(0, "seconds", max_step=max_step, age=age)
        self.max_step = max_step
        self.age = age

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        able = set(names)
        asked = [name for name in view.waiting_adapters if name in able]
        due = view.now - self.age
        admit = list(islice(takewhile(lambda r: r.arrival <= due, by_arrival(view, asked)), limit))
        taken = {request.request_id for request in admit}
        for alike in self._by_cost(view, asked):
            if len(admit) == limit:
                break
            fresh = (r for r in by_arrival(view, alike) if r.request_id not in taken)
            admit += islice(fresh, limit - len(admit))
        return self._within(view, admit)

    def _by_cost(self, view: SchedulerView, names: Sequence[str | None]) -> Iterator[Sequence[str | None]]:
        """Yield the adapters that make a step equally long, the shortest first.

        It is worked out for each rank, and once for what is in the batch, which adds no rank."""
        if len(names) <= 1 or view.costs.step(1) is None:
            yield names
            return
        running = view.running
        batch = {request.adapter for request in running}
        by_rank: dict[int | None, list[str | None]] = {}
        for name in names:
            rank = None if name is None or name in batch else view.adapters[name].rank
            by_rank.setdefault(rank, []).append(name)
        ranks = _ranks(view, batch)
        now = view.costs.step(len(running), ranks) if running else 0.0
        by_cost: dict[float, list[str | None]] = {}
        for rank, alike in by_rank.items():
            then = view.costs.step(len(running) + 1, ranks if rank is None else sorted([*ranks, rank]))
            # To the microsecond, so that what makes no difference is no difference.
            added = 0.0 if now is None or then is None else round(then - now, 6)
            by_cost.setdefault(added, []).extend(alike)
        for added in sorted(by_cost):
            yield by_cost[added]

    def _within(self, view: SchedulerView, admit: list[RequestView]) -> list[RequestView]:
        """Yield requests as long as a step takes no longer than ``max_step``."""
        if not self.max_step:
            return admit
        batch = {request.adapter for request in view.running}
        running = len(view.running)
        for index, request in enumerate(admit):
            batch.add(request.adapter)
            seconds = view.costs.step(running + index + 1, _ranks(view, batch))
            if seconds is not None and seconds > self.max_step and running + index > 0:
                return admit[:index]
        return admit


def _ranks(view: SchedulerView, names: set[str | None]) -> list[int]:
    return sorted(view.adapters[name].rank for name in names if name is not None and name in view.adapters)
