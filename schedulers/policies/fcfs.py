"""First come, first served, with ageing: the default policy, and the one to read first.

Requests whose adapter is in no slot are skipped, not waited for. Such an adapter is called cold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice, tee
from math import inf
from operator import attrgetter

import msgspec

from aioengine.schedulers.arrival import by_arrival, cold_by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.policy import (
    AdapterView,
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

LOOKAHEAD = 8  # cold adapters, of those that are not being read, that are to be on the CPU
SCAN_LIMIT = 256  # cold adapters, and requests of a closed slot, that one decision examines
SLOT_BOUND = """for a slot: 2 max_wait, one longest generation and one copy, as often as there are max_loras \
older adapters that wait too, and once more"""
Score = Callable[[SlotView, AdapterView], float]  # the adapter with the lowest leaves its slot first
DISK, LOADING, CPU = Location.DISK, Location.LOADING, Location.CPU  # an enum's members are slow to look up
UNWANTED, WANTED, BUSY, SETTLING = range(4)  # idle without, with waiting requests; busy since long, or short


class FCFS(SchedulerPolicy):
    """Starts requests that can run in order of arrival, and gives slots to the adapters waited for longest.

    A cold adapter gets a free slot, or an idle one that no request waits for. After ``max_wait`` seconds it
    gets an idle slot that only later requests wait for. If there is none, the busy slot that will be free
    soonest is closed for it: what runs there finishes, and only requests start that end before. So that an
    overload does not close all slots at once, none is closed within 2 ``max_wait`` after it was filled.

    Args:
        max_wait: Seconds that an adapter's oldest request waits before others make way for it.
    """

    source = "aioengine's own"
    starvation_bound = f"{SLOT_BOUND}; then those who arrived before it"

    def __init__(self, max_wait: float = 1.0) -> None:
        at_least(0, "seconds", max_wait=max_wait)
        self.max_wait = self.take_after = self.close_after = max_wait
        self.stay = 2 * max_wait
        self.placed: dict[str | None, float] = {}  # when each adapter came into its slot
        self.no_room = Counter[str | None]()  # how often free memory in pieces had no room for an adapter

    def on_event(self, event: PolicyEvent) -> None:
        if event.kind == "adapter_placed":
            self.placed[event.adapter] = event.now
            del self.no_room[event.adapter]
        elif event.kind in ("adapter_evicted", "adapter_retired"):
            self.placed.pop(event.was or event.adapter, None)

    def schedule(self, view: SchedulerView) -> Decision:
        cold, cold_again = tee(cold_by_arrival(view))
        plan = self.assign_slots(view, cold, lambda slot, adapter: slot.last_used)
        seqs, room = view.free_seqs, view.load_room
        admit = list(islice(by_arrival(view, plan.open), seqs)) if seqs > 0 else []
        admit += plan.fill(seqs - len(admit))
        ahead = (n for n in cold_again if view.adapters[n].location is not LOADING)
        on_disk = [n for n in islice(ahead, LOOKAHEAD if room else 0) if view.adapters[n].location is DISK]
        read = on_disk[:room]
        return Decision(
            admit=[request.request_id for request in admit],
            place=plan.place,
            evict=plan.evict,
            prefetch=read,
            ask_again=None if 0 < len(read) < room else plan.ask_again,  # others could be read
        )

    def assign_slots(self, view: SchedulerView, cold: Iterable[str], score: Score) -> SlotPlan:
        """Find slots for the adapters in ``cold``, the most urgent first."""
        plan, adapters, now = SlotPlan(view, score, self), view.adapters, view.now
        for name in islice(cold, SCAN_LIMIT):
            adapter = adapters[name]
            location, oldest = adapter.location, adapter.oldest_arrival
            if oldest is None or location is LOADING or (location is DISK and not plan.tight):
                continue
            take, close = oldest + self.take_after <= now, oldest + self.close_after <= now
            if location is CPU or (take and plan.lack(adapter) > 0):
                kind = BUSY if close and plan.closes else WANTED if take else UNWANTED
                found = plan.find(adapter, (h for h in plan.held if h.oldest > oldest and h.kind <= kind))
                if found is not None:
                    plan.take(found, adapter, now=not found or found[-1].kind < BUSY)
                elif close or not (plan.free or any(held.kind == UNWANTED for held in plan.held[:1])):
                    if take:
                        return plan  # what becomes free is for this adapter, however long others wait
                    break
        waited = (adapters[name].oldest_arrival or 0.0 for name in cold_by_arrival(view))
        next_take = next((t for at in waited if (t := at + self.take_after) > now), inf)
        if plan.ask_again is not None and next_take < inf and any(h.kind == WANTED for h in plan.held):
            plan.ask_again = next_take
        return plan


class HeldSlot(msgspec.Struct, frozen=True, eq=False):
    """A slot that its adapter may have to leave."""

    kind: int
    value: float  # of the same kind, the slot with the lowest is given away first
    oldest: float  # arrival of the first request that waits for the adapter; infinity if none does
    name: str
    adapter: AdapterView


class SlotPlan:
    """What one decision does with the slots. It ``closes`` some only where requests could start."""

    def __init__(self, view: SchedulerView, score: Score, policy: FCFS) -> None:
        self._view, self._score, self._policy = view, score, policy
        policy.no_room.update(item.item for item in view.refused if item.reason == "place_no_room")
        self.place, self.evict = list[Place](), list[str]()
        self.closed: dict[str, None] = {}  # adapters whose slots admit no requests, so that others get them
        self.ask_again: float | None = inf
        filled = [(name, slot) for slot in view.slots if (name := slot.adapter) is not None]
        self.free = len(view.slots) - len(filled)
        self._free_bytes = view.memory.free if view.memory.elastic else None
        self._full, self._cpu_bytes = view.cpu_room <= 0, view.cpu_bytes_room
        self.tight = self._full or self._cpu_bytes is not None  # the CPU cache may lack room
        self._left: Mapping[str | None, int] = {}
        wanted = [(name, slot) for name, slot in filled if view.adapters[name].oldest_arrival is not None]
        self._wanted = [name for name, slot in wanted if slot.state is not SlotState.LOADING]
        self.closes = bool(self._wanted) and view.free_seqs > 0

    @property
    def open(self) -> list[str | None]:
        """The adapters in slots whose requests may start; None: the base model."""
        leaving = {*self.closed, *self.evict}
        return [None, *(name for name in self._wanted if name not in leaving)]

    def lack(self, adapter: AdapterView) -> int:
        """Return the bytes that must leave the CPU cache before the adapter can be read; 0 if it has room."""
        return max(0 if self._cpu_bytes is None else adapter.bytes - self._cpu_bytes, int(self._full))

    @cached_property
    def held(self) -> list[HeldSlot]:
        """The slots that can be given to others, the best first."""
        view, placed, found = self._view, self._policy.placed, list[HeldSlot]()
        left = self._left = view.tokens_left if self.closes else {}
        for slot in view.slots:
            name = slot.adapter
            if name is None or slot.state is not SlotState.READY or (adapter := view.adapters[name]).pinned:
                continue
            oldest = inf if adapter.oldest_arrival is None else adapter.oldest_arrival
            if adapter.running:
                kind = SETTLING if placed.get(name, -inf) > view.now - self._policy.stay else BUSY
                value: float = left.get(name, 0)
            else:
                kind, value = UNWANTED if oldest == inf else WANTED, self._score(slot, adapter)
            found.append(HeldSlot(kind, value, oldest, name, adapter))
        return sorted(found, key=attrgetter("kind", "value"))

    def find(self, adapter: AdapterView, candidates: Iterator[HeldSlot]) -> Sequence[HeldSlot] | None:
        """Return as many of ``candidates`` as must leave so that an adapter on the CPU has a slot and its
        memory, or one on disk can be read. None if they are too few."""
        on_disk = adapter.location is DISK
        if not on_disk and self._free_bytes is None:  # each adapter takes one slot
            return () if self.free > 0 else tuple(islice(candidates, 1)) or None
        found, memory = list[HeldSlot](), self._view.memory
        slots, nbytes, more, lack = 1, 0, 0, self.lack(adapter) if on_disk else 0
        if not on_disk:
            needed = memory.bytes_of(adapter.name)
            more = min(needed * (1 + self._policy.no_room.get(adapter.name, 0)), memory.total) - needed
            slots, nbytes = self.free, needed + more - (self._free_bytes or 0)
        while slots <= 0 or nbytes > 0 or lack > 0:
            held = next(candidates, None)
            if held is None:
                return found if on_disk or (slots > 0 and nbytes <= more) else None
            found.append(held)
            slots, lack = slots + 1, lack - held.adapter.bytes
            nbytes -= memory.bytes_of(held.name)
        return found

    def take(self, found: Sequence[HeldSlot], adapter: AdapterView, *, now: bool) -> None:
        """Place an adapter where those in ``found`` leave. Not ``now``, or if it is on disk: close these."""
        if adapter.location is DISK:
            now, idle = False, any(held.kind < BUSY for held in found[:1])
            self.ask_again = None if idle else self.ask_again  # idle slots admit again once the read begins
        else:
            self.free += len(found) - 1
            if self._free_bytes is not None:
                size = self._view.memory.bytes_of
                self._free_bytes += sum(size(held.name) for held in found) - size(adapter.name)
            for held in found:
                self.held.remove(held)
        if now:
            self.place.append(Place(adapter.name))
            self.evict += [held.name for held in found]
        else:
            self.closed |= {held.name: None for held in found}

    def fill(self, limit: int) -> list[RequestView]:
        """Return requests for closed slots that end before the longest one that runs there."""
        fitting = [
            request
            for name in (self.closed if limit > 0 else ())
            for request in islice(self._view.waiting_for(name), SCAN_LIMIT)
            if request.max_tokens - request.output_tokens <= self._left.get(name, 0)
        ]
        return sorted(fitting, key=attrgetter("arrival"))[:limit]
