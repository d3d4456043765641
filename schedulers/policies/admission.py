"""Goodput by early rejection: requests that cannot be served in time are rejected at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import Decision, Location, RequestView, SchedulerView

SCAN_LIMIT = 256
"""Maximum number of waiting requests that one decision examines, the oldest first."""


class Admission(FCFS):
    """First come, first served, but requests that would miss their deadline are rejected while they wait.

    Under overload, a queue without rejections serves all requests late. Here the end of each waiting request
    is estimated by ``view.costs``. The estimate is the sum of the work before it (the prompts, and its part
    of the generation: tokens times the seconds of a full step, divided by the requests that run at once), the
    wait for a place in the batch if all are taken, its adapter's load and copy, its own prompt and its own
    tokens. If the end is later than the deadline, the request is rejected, and takes no time from later ones.
    Requests without a deadline are never rejected, and none is before steps have been measured.

    Args:
        margin: Factor on the estimates: more than 1 rejects more requests, less than 1 fewer.
        max_wait: As for ``fcfs``.
    """

    source = "aioengine's own, after Qin et al. 2025, Mooncake (FAST'25): early rejection by predicted load"
    starvation_bound = "as fcfs, or until it is rejected"

    def __init__(self, margin: float = 1.0, max_wait: float = 1.0) -> None:
        if not margin > 0:
            raise ValueError(f"margin={margin}: must be > 0")
        super().__init__(max_wait)
        self.margin = margin

    def schedule(self, view: SchedulerView) -> Decision:
        reject = list(self._too_late(view))
        decision = super().schedule(view)
        if all(request.deadline is None for request in islice(view.waiting, SCAN_LIMIT)):
            return decision
        gone = {request_id for request_id, _ in reject}
        admit = [request_id for request_id in decision.admit if request_id not in gone]
        return decision._replace(admit=admit, reject=reject)

    def _too_late(self, view: SchedulerView) -> Iterator[tuple[str, str]]:
        """Yield (request, reason) for each request that cannot be served in time."""
        waiting = list(islice(view.waiting, SCAN_LIMIT))
        if all(request.deadline is None for request in waiting):
            return
        running = view.running
        seats = len(running) + view.free_seqs
        ranks = [view.adapters[s.adapter].rank for s in view.slots if s.adapter is not None and s.running > 0]
        step = view.costs.step(min(seats, len(running) + len(waiting)), ranks)
        if step is None:
            return
        free = view.free_seqs
        left = sorted(max(r.expected_tokens - r.output_tokens, 1) for r in running)
        before = 0.0
        """Seconds of the device for all earlier requests."""
        for place, request in enumerate(waiting):
            own = request.expected_tokens * step
            prompt = self._prompt(view, request)
            seat = left[min(place - free, len(left) - 1)] * step if place >= free and left else 0.0
            takes = max(before, seat, self._load(view, request)) + prompt + own
            deadline = request.deadline
            end = view.now + takes * self.margin
            if deadline is not None and request.output_tokens == 0 and end > deadline:
                late = end - deadline
                yield request.request_id, f"it would end {late:.2f} s after its deadline"
                free += 1
                continue
            before += prompt + own / seats

    @staticmethod
    def _prompt(view: SchedulerView, request: RequestView) -> float:
        adapter = view.adapters.get(request.adapter or "")
        cached, rank = request.cached_tokens, 0 if adapter is None else adapter.rank
        return view.costs.prefill(request.prompt_tokens - cached, rank, cached=cached) or 0.0

    @staticmethod
    def _load(view: SchedulerView, request: RequestView) -> float:
        adapter = view.adapters.get(request.adapter or "")
        if adapter is None or adapter.location is Location.SLOT:
            return 0.0
        read = 0.0 if adapter.location is Location.CPU else view.costs.load(adapter.name, "disk") or 0.0
        return read + (view.costs.load(adapter.name, "slot") or 0.0)
