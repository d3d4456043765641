"""Policies composed of parts: ``compose(order="edf", replace="gdsf")``, or "edf+gdsf" as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, tee
from math import inf

from aioengine.schedulers.arrival import cold_by_arrival
from aioengine.schedulers.parts.base import Ordering, Preemption, Prefetch, Replacement
from aioengine.schedulers.policies.fcfs import BUSY, FCFS, SCAN_LIMIT, SLOT_BOUND, SlotPlan
from aioengine.schedulers.policy import Decision, Location, PolicyEvent, SchedulerView


class Composed(FCFS):
    """A policy composed of four parts, with the ageing of ``fcfs``.

    Requests whose adapter is in no slot are skipped, not waited for; the others start in the order of the
    ordering. Cold adapters get slots as with ``fcfs``: those that have been waited for long by age, then the
    others in the ordering's order. The replacement chooses which idle adapters leave for them.

    Args:
        order, replace, prefetch, preempt: The parts.
        max_wait: Seconds that an adapter's oldest request waits before others make way for it.
    """

    def __init__(
        self,
        order: Ordering,
        replace: Replacement,
        prefetch: Prefetch,
        preempt: Preemption,
        *,
        max_wait: float = 1.0,
    ) -> None:
        super().__init__(max_wait)
        self.order, self.replace, self.prefetch, self.preempt = order, replace, prefetch, preempt
        if order.take_after is not None:
            self.take_after = order.take_after
        if order.close_after is not None:
            self.close_after = order.close_after
        self.starvation_bound = f"{SLOT_BOUND}; then {order.starvation_bound}"
        if self.close_after == inf:
            self.starvation_bound = "none"

    def on_event(self, event: PolicyEvent) -> None:
        super().on_event(event)
        for part in (self.order, self.replace, self.prefetch, self.preempt):
            part.on_event(event)

    def schedule(self, view: SchedulerView) -> Decision:
        by_urgency = self._aged_first(view) if self.order.ages else self.order.cold(view)
        cold, cold_too, cold_again, shown = tee(by_urgency, 4)
        plan = self.assign_slots(view, cold, lambda slot, adapter: self.replace.score(view, slot, adapter))
        room, names = view.free_seqs, plan.open
        admit = list(self.order.admit(view, names, room)) if room > 0 else []
        holds_back = len(admit) < room and len(admit) < sum(len(view.waiting_for(name)) for name in names)
        holds_back = holds_back or not set(cold_by_arrival(view)).issubset(shown)
        ahead = self.prefetch.choose(view, cold_again) if view.load_room else None
        preempt = self.preempt.choose(view)
        read = [*self._read_for_slots(view, plan, cold_too), *(ahead or ())]
        more_to_read = ahead is not None or 0 < len(read) < view.load_room
        always = holds_back or more_to_read or preempt is not None
        admit += plan.fill(room - len(admit))
        return Decision(
            admit=[request.request_id for request in admit],
            place=plan.place,
            prefetch=list(dict.fromkeys(read))[: view.load_room],
            preempt=preempt or (),
            evict=plan.evict,
            discard=self.replace.discard(view),
            ask_again=None if always else plan.ask_again,
        )

    def _read_for_slots(self, view: SchedulerView, plan: SlotPlan, cold: Iterator[str]) -> Iterator[str]:
        """Yield the adapters on disk for which there is a slot without running requests."""
        idle = [held.oldest for held in plan.held if held.kind < BUSY]
        for name in islice(cold, SCAN_LIMIT if plan.free or idle else 0):
            adapter = view.adapters[name]
            oldest = adapter.oldest_arrival or 0.0
            latest = inf if plan.free else max(idle)
            if latest < inf and (oldest >= latest or oldest + self.take_after > view.now):
                return
            if adapter.location is Location.DISK:
                yield name

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        return sorted(candidates, key=lambda name: self.replace.cpu_score(view, view.adapters[name]))

    def _aged_first(self, view: SchedulerView) -> Iterator[str]:
        """Yield the cold adapters: aged ones by age, then the others in the ordering's order."""
        aged: set[str] = set()
        for name in cold_by_arrival(view):
            oldest = view.adapters[name].oldest_arrival
            if oldest is None or oldest + self.take_after > view.now:
                break  # and those after it have waited less
            aged.add(name)
            yield name
        yield from (name for name in self.order.cold(view) if name not in aged)
