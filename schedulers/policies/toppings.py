"""Rank-aware: what makes a step least longer goes first."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import merge
from itertools import islice, takewhile

from aioengine.schedulers.policies.fcfs import Arrival
from aioengine.schedulers.policy import RequestView, SchedulerView


class Toppings(Arrival):
    """Requests by what their adapter adds to the step: those for adapters in the batch and of low ranks
    first.

    A step waits for its largest rank, so one request for a large adapter makes all others slower. What each
    adapter would add is asked of ``view.costs``: the time of a step with one request more and the ranks that
    it would have then, less the time of the step as it is. Equal ones go in order of arrival. With
    ``max_step``, nobody is admitted while a step would take longer than that, unless nothing runs.

    The paper's system does so between servers: a request goes to the one whose step it makes least longer,
    within its objective. Here it is the order within one.

    Args:
        max_step: Seconds that a decoding step may take; 0: any.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = "Li et al. 2025, Toppings: CPU-Assisted, Rank-Aware Adapter Serving for LLM Inference (ATC'25)"
    starvation_bound = "age, those who arrived before it, and one longest generation"

    def __init__(self, max_step: float = 0.0, age: float = 5.0) -> None:
        for name, value in (("max_step", max_step), ("age", age)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: must be >= 0 seconds")
        self.max_step = max_step
        self.age = age

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        batch = {request.adapter for request in view.running}
        asked = [name for name in names if len(view.waiting_for(name)) > 0]
        if len(asked) > 1 and view.costs.step(1) is not None:
            added = {name: self._added(view, batch, name) for name in asked}
        else:
            added = dict.fromkeys(asked, 0.0)
        due = view.now - self.age
        queues = merge(*map(view.waiting_for, asked), key=lambda request: request.arrival)
        admit = list(islice(takewhile(lambda request: request.arrival <= due, queues), limit))
        taken = {request.request_id for request in admit}
        for cost in sorted(set(added.values())):
            alike = [view.waiting_for(name) for name in asked if added[name] == cost]
            fresh = (r for r in merge(*alike, key=lambda r: r.arrival) if r.request_id not in taken)
            admit += islice(fresh, limit - len(admit))
        return self._within(view, admit)

    def _added(self, view: SchedulerView, batch: set[str | None], name: str | None) -> float:
        """Seconds, to the microsecond, so that what makes no difference is no difference."""
        running = len(view.running)
        now = view.costs.step(running, _ranks(view, batch)) if running else 0.0
        then = view.costs.step(running + 1, _ranks(view, batch | {name}))
        return 0.0 if now is None or then is None else round(then - now, 6)

    def _within(self, view: SchedulerView, admit: list[RequestView]) -> list[RequestView]:
        """The first of them, as long as a step takes no longer than ``max_step``."""
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
