"""Policies put together from parts: ``compose(order="edf", replace="gdsf")``, or "edf+gdsf" as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import inf

from aioengine.schedulers.parts import Ordering, Preemption, Prefetch, Replacement, is_cold
from aioengine.schedulers.policy import (
    Decision,
    Location,
    Place,
    PolicyEvent,
    RequestView,
    SchedulerPolicy,
    SchedulerView,
    SlotState,
    SlotView,
)

SCAN_LIMIT = 256
"""Cold adapters that one decision looks at; those further back have their turn when these have moved."""
STAY = 2.0
"""In units of ``max_wait``: how long an adapter keeps its slot before the slot may be closed. Without it,
an overload, in which everybody has waited long, would close slots as soon as they are filled."""
SLOT_BOUND = (
    "for a slot: 2 max_wait, one longest generation and one copy, as often as there are max_loras older "
    "adapters that wait too, and once more"
)
FILL_LIMIT = 32
"""Waiting requests of a closed slot that one decision looks at."""


class Composed(SchedulerPolicy):
    """A policy out of four parts, with ageing.

    Requests whose adapter is in no slot are skipped, not waited for; the others are admitted in the
    ordering's order. A cold adapter gets a free slot, or an idle one that nobody waits for, chosen by
    the replacement. If there is none for ``max_wait`` seconds, an idle slot that only later requests
    wait for is taken, else the busy slot that will be free soonest (the fewest tokens left to
    generate) is closed: it finishes what runs in it, admits only what ends before that does, and then
    goes to the adapter that has waited longest. A slot is not closed within 2 ``max_wait`` after it was
    filled.

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
        if not max_wait >= 0:
            raise ValueError(f"max_wait={max_wait}: must be >= 0 seconds")
        self.order, self.replace, self.prefetch, self.preempt = order, replace, prefetch, preempt
        self.max_wait = max_wait
        self._take_after = max_wait if order.take_after is None else order.take_after
        self._placed: dict[str, float] = {}
        """When each adapter in a slot was put there."""
        self._close_after = max_wait if order.close_after is None else order.close_after
        if self._close_after == inf:
            self.starvation_bound = "none"
        else:
            self.starvation_bound = f"{SLOT_BOUND}; then {order.starvation_bound}"

    def on_event(self, event: PolicyEvent) -> None:
        if event.kind == "adapter_placed" and event.adapter is not None:
            self._placed[event.adapter] = event.now
        elif event.kind == "adapter_evicted" and event.adapter is not None:
            self._placed.pop(event.adapter, None)
        elif event.kind == "adapter_retired" and event.was in self._placed and event.adapter is not None:
            self._placed[event.adapter] = self._placed.pop(event.was)
        for part in (self.order, self.replace, self.prefetch, self.preempt):
            part.on_event(event)

    def schedule(self, view: SchedulerView) -> Decision:
        place, read, closed = self._assign_slots(view)
        given = {view.slots[p.slot].adapter for p in place if p.slot is not None}
        open_queues: list[str | None] = [None]
        for slot in view.slots:
            usable = slot.state in (SlotState.READY, SlotState.DRAINING)
            if usable and slot.adapter not in closed and slot.adapter not in given:
                open_queues.append(slot.adapter)
        admit = self.order.admit(view, open_queues, view.free_seqs) if view.free_seqs > 0 else ()
        if view.load_room > len(read):
            read += self.prefetch.choose(view, self._by_urgency(view))
        room = view.free_seqs - len(admit)
        if room > 0 and closed:
            admit = [*admit, *self._fill(view, closed)[:room]]
        return Decision(
            admit=[request.request_id for request in admit],
            place=place,
            prefetch=list(dict.fromkeys(read)),
            preempt=self.preempt.choose(view),
        )

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        return sorted(candidates, key=lambda name: self.replace.cpu_score(view, view.adapters[name]))

    @staticmethod
    def _fill(view: SchedulerView, closed: set[str | None]) -> list[RequestView]:
        """Requests for closed slots that end before what runs there does, so that nobody waits longer
        for the slot because of them."""
        tokens_left = tokens_left_by_adapter(view)
        fitting = [
            request
            for name in closed
            if name in tokens_left
            for request in islice(view.waiting_for(name), FILL_LIMIT)
            if request.max_tokens - request.output_tokens <= tokens_left[name]
        ]
        return sorted(fitting, key=lambda request: request.arrival)

    def _by_urgency(self, view: SchedulerView) -> Iterator[str]:
        """Cold adapters: the aged ones by age, then all others in the ordering's order. Lazy."""
        aged: list[str] = []
        for name in view.waiting_adapters:
            if name is None or not is_cold(view, name):
                continue
            if self._waited(view, name) < self.max_wait:
                break  # and those after it have waited less
            aged.append(name)
            yield name
        seen = set(aged)
        yield from (name for name in self.order.cold(view) if name not in seen)

    def _settling(self, view: SchedulerView) -> set[str | None]:
        """Adapters whose busy slots are not closed yet, because they came only a short time ago."""
        if self.max_wait == 0:
            return set()
        since = view.now - STAY * self.max_wait
        return {name for name, placed in self._placed.items() if placed > since}

    @staticmethod
    def _waited(view: SchedulerView, name: str) -> float:
        oldest = view.adapters[name].oldest_arrival
        return 0.0 if oldest is None else view.now - oldest

    def _assign_slots(self, view: SchedulerView) -> tuple[list[Place], list[str], set[str | None]]:
        """(slots for the cold adapters, adapters to read because there is a slot that they could have,
        adapters whose slots are closed for the sake of cold ones)."""
        place: list[Place] = []
        read: list[str] = []
        closed: set[str | None] = set()
        pool = _SlotPool(view, self.replace, self._settling(view))
        for name in islice(self._by_urgency(view), SCAN_LIMIT):
            adapter = view.adapters[name]
            waited, oldest = self._waited(view, name), adapter.oldest_arrival
            may_take, may_close = waited >= self._take_after, waited >= self._close_after
            if not pool.has_any(oldest, may_take=may_take, may_close=may_close):
                if waited >= self.max_wait or not may_take:
                    break  # those after it have waited less: there is nothing for them either
                continue
            if adapter.location is Location.CPU and (slot := pool.take_unwanted()) is not None:
                place.append(Place(name, slot.index))
            elif adapter.location is Location.DISK and view.cpu_room > 0 and _lacking(view, name) <= 0:
                # It can be read without anybody making way, and is if there will be a slot for it.
                if len(read) < view.load_room and pool.has_idle(oldest if may_take else None):
                    read.append(name)
            elif adapter.location is not Location.LOADING:
                # On disk, and the cache is full: the core finds what may leave it, if anything may.
                if adapter.location is Location.DISK and len(read) < view.load_room:
                    read += [name] if pool.has_idle(oldest if may_take else None) else []
                for slot in _make_way(view, pool, name, take=may_take, close=may_close):
                    closed.add(slot.adapter)
                    if slot.running == 0 and adapter.location is Location.CPU:
                        place.append(Place(name, slot.index))
        return place, read, closed


class _SlotPool:
    """The slots of one decision that may still be given away."""

    def __init__(self, view: SchedulerView, replace: Replacement, settling: set[str | None]) -> None:
        self._view = view
        self._settling = settling
        self._replace = replace
        self._oldest: dict[int, float] = {}
        """By slot: when the first of those who wait for its adapter arrived; inf if nobody does."""
        free: list[SlotView] = []
        unwanted: list[SlotView] = []
        self._wanted: list[SlotView] = []
        """Busy, or waited for, or both."""
        for slot in view.slots:
            if slot.adapter is None:
                free.append(slot)
            elif slot.state is SlotState.READY and not slot.pinned:
                oldest = view.adapters[slot.adapter].oldest_arrival
                self._oldest[slot.index] = inf if oldest is None else oldest
                (unwanted if oldest is None and slot.running == 0 else self._wanted).append(slot)
        self._unwanted: Iterator[SlotView] = chain(free, self._by_score(unwanted))
        self._spare = len(free) + len(unwanted)
        self._tokens_left: dict[str | None, int] | None = None

    def has_any(self, before: float | None, *, may_take: bool, may_close: bool) -> bool:
        """Whether there is a slot for an adapter that has been waited for since ``before``."""
        if self._spare > 0:
            return True
        return any(
            self._younger(slot, before)
            and ((may_close and slot.adapter not in self._settling) or (may_take and slot.running == 0))
            for slot in self._wanted
        )

    def has_idle(self, before: float | None) -> bool:
        """Whether there is a free slot, or an idle one that nobody waits for or (given ``before``) only
        those who came later."""
        idle = (slot for slot in self._wanted if slot.running == 0)
        return self._spare > 0 or any(self._younger(slot, before) for slot in idle)

    def take_unwanted(self) -> SlotView | None:
        """A free slot, else the idle one that nobody waits for and that the replacement values least."""
        slot = next(self._unwanted, None)
        self._spare -= slot is not None
        return slot

    def take_idle(self, before: float | None) -> SlotView | None:
        """An idle slot that only requests after ``before`` wait for."""
        idle = [s for s in self._wanted if s.running == 0 and self._younger(s, before)]
        return self._take(next(self._by_score(idle), None))

    def take_busy(self, before: float | None) -> SlotView | None:
        """The slot that will be idle soonest, if only requests after ``before`` wait for it."""
        busy = [s for s in self._wanted if s.adapter not in self._settling and self._younger(s, before)]
        tokens_left = self._tokens_left_by_adapter() if busy else {}
        by_end = sorted(busy, key=lambda s: (tokens_left.get(s.adapter, 0), s.last_used))
        return self._take(next(iter(by_end), None))

    def _take(self, slot: SlotView | None) -> SlotView | None:
        if slot is not None:
            self._wanted.remove(slot)
        return slot

    def _by_score(self, slots: list[SlotView]) -> Iterator[SlotView]:
        """Lazily, so that nothing is scored when no slot is asked for."""
        adapters = self._view.adapters

        def score(slot: SlotView) -> tuple[float, int]:
            assert slot.adapter is not None
            return self._replace.score(self._view, slot, adapters[slot.adapter]), slot.index

        yield from sorted(slots, key=score)

    def _younger(self, slot: SlotView, before: float | None) -> bool:
        return self._oldest[slot.index] > (inf if before is None else before)

    def _tokens_left_by_adapter(self) -> dict[str | None, int]:
        if self._tokens_left is None:
            self._tokens_left = tokens_left_by_adapter(self._view)
        return self._tokens_left


def _make_way(
    view: SchedulerView, pool: _SlotPool, name: str, *, take: bool, close: bool
) -> Iterator[SlotView]:
    """A slot for the adapter, idle or to be closed; more than one if what must leave the CPU cache before
    it can be read takes that."""
    oldest, lacking = view.adapters[name].oldest_arrival, _lacking(view, name)
    while True:
        slot = pool.take_idle(oldest) if take else None
        if slot is None and close:
            slot = pool.take_busy(oldest)
        if slot is None or slot.adapter is None:
            return
        yield slot
        lacking -= view.adapters[slot.adapter].bytes
        if lacking <= 0:
            return


def _lacking(view: SchedulerView, name: str) -> int:
    """Bytes that must leave the CPU cache before the adapter can be read, as far as its size is known."""
    adapter, room = view.adapters[name], view.cpu_bytes_room
    return 0 if room is None or adapter.location is not Location.DISK else adapter.bytes - room


def tokens_left_by_adapter(view: SchedulerView) -> dict[str | None, int]:
    """By adapter: the most tokens that one of its running requests has left to generate."""
    left: dict[str | None, int] = {}
    for request in view.running:
        tokens = request.max_tokens - request.output_tokens
        left[request.adapter] = max(left.get(request.adapter, 0), tokens)
    return left
