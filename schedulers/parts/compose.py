"""Policies composed of parts: ``compose(order="edf", replace="gdsf")``, or "edf+gdsf" as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from math import inf

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Ordering, Part, Preemption, Prefetch, Replacement
from aioengine.schedulers.parts.shares import Shares
from aioengine.schedulers.parts.slot_pool import Claim, SlotPool, fill, lacking_room, needed_until
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
)

SCAN_LIMIT = 256
"""Maximum number of cold adapters that one decision examines; later decisions examine the rest."""
SLOT_BOUND = (
    "for a slot: 2 max_wait, one longest generation and one copy, as often as there are max_loras older "
    "adapters that wait too, and once more"
)
EARLY = 1e-6
"""Seconds by which a policy is asked before its time, because sums of times are rounded."""


class Composed(SchedulerPolicy):
    """A policy composed of four parts, with ageing.

    Requests whose adapter is in no slot are skipped, not waited for; the others are admitted in the
    ordering's order. A cold adapter gets a free slot, or an idle one that no request waits for, chosen by the
    replacement. If there is none for ``max_wait`` seconds, it gets an idle slot that only later requests wait
    for. Otherwise the busy slot that will be free soonest (with the fewest tokens left to generate) is
    closed: its running requests finish, it admits only requests that end before these, and then it goes to
    the adapter that has waited longest. A slot is not closed within 2 ``max_wait`` after it was filled.

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
        at_least(0, "seconds", max_wait=max_wait)
        self.order, self.replace, self.prefetch, self.preempt = order, replace, prefetch, preempt
        self.max_wait = max_wait
        parts: tuple[Part, ...] = (order, replace, prefetch, preempt)
        self._listeners = [part.on_event for part in parts if type(part).on_event is not Part.on_event]
        self._shares = None if order.sharing == "none" else Shares(order, max_wait)
        self._stay = order.stay * max_wait
        self._take_after = max_wait if order.take_after is None else order.take_after
        self._placed: dict[str, float] = {}
        """Time at which each adapter was placed in its slot, in order."""
        parts = (order, prefetch, preempt)
        self._by_events = all(part.by_events for part in parts)
        self._by_oldest = all(part.by_oldest for part in parts)
        self._idle_if_none_waits = self._by_oldest and type(replace).discard is Replacement.discard
        self._is_fixed = False
        """Whether slots had a fixed size in the last decision."""
        self._was_full = False
        """Whether it found every slot running, being filled, or pinned."""
        self._refused: dict[str, int] = {}
        """Number of consecutive decisions that placed each adapter; it is placed again only if the core had
        no room for it."""
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
            was, now = event.was, event.adapter
            self._placed = {now if n == was else n: placed for n, placed in self._placed.items()}
        if self._shares is not None:
            self._shares.clients.on_event(event)
        for listen in self._listeners:
            listen(event)

    def schedule(self, view: SchedulerView) -> Decision:
        self._is_fixed, self._was_full = not view.memory.elastic, False
        if self._shares is not None:
            self._shares.clients.sync(view)
        if self._idle_if_none_waits and not view.waiting_adapters:
            self._refused = {}
            return Decision(ask_again=inf)
        if self._shares is not None and self._shares.clients.several:
            return self._schedule_shared(view, self._shares)
        place, evict, read, closed, pool = self._assign_slots(view)
        leaving = {item.slot for item in place}
        idle_closed = any(
            not slot.running and slot.adapter in closed and slot.index not in leaving for slot in view.slots
        )
        room = view.free_seqs
        admit: Sequence[RequestView] = ()
        if room > 0:
            awaited = pool.awaited if pool is not None and self._by_oldest else None
            names = _open_queues(view, place, closed.union(evict), awaited)
            admit = self.order.admit(view, names, room)
        if view.load_room > len(read):
            read += self.prefetch.choose(view, (name for name, _, _ in self._by_urgency(view)))
        if room > len(admit) and pool is not None and (kept_out := closed.intersection(pool.awaited)):
            fitting = fill(view, kept_out, pool.tokens_left, self.order.fill_within)
            admit = [*admit, *fitting[: room - len(admit)]]
        return Decision(
            admit=[request.request_id for request in admit],
            place=place,
            prefetch=list(dict.fromkeys(read)),
            preempt=self.preempt.choose(view),
            evict=evict,
            discard=self.replace.discard(view),
            ask_again=None if idle_closed else self._ask_again(view),
        )

    def _schedule_shared(self, view: SchedulerView, shares: Shares) -> Decision:
        """Make the decision when several tenants have requests."""
        settling = self._settling(view)
        place, read, closed, preempt, evict, cold = shares.assign_slots(view, self.replace, settling)
        room = view.free_seqs + len(preempt)
        names = _open_queues(view, place, closed.union(evict))
        admit, victims = shares.admit(view, names, room, preempt)
        room += len(victims) - len(admit)
        if view.load_room > len(read):
            read += self.prefetch.choose(view, iter(cold))
        if room > 0 and closed:
            admit += fill(view, closed, view.tokens_left, self.order.fill_within)[:room]
        return Decision(
            admit=[request.request_id for request in admit],
            place=place,
            prefetch=list(dict.fromkeys(read)),
            preempt=list(dict.fromkeys([*preempt, *victims, *self.preempt.choose(view)])),
            evict=evict,
            discard=self.replace.discard(view),
        )

    def _ask_again(self, view: SchedulerView) -> float | None:
        """Return the time until which a decision that is carried out holds without events: until an adapter
        has been waited for, or has been in its slot, long enough."""
        if not self._by_events or self._refused:
            return None
        if self._is_fixed and self._by_oldest and (self._was_full or _is_full(view)):
            return inf  # slots could only be closed, which matters when a request comes
        now = view.now
        waits = {self.max_wait, self._take_after, self._close_after}
        times = [_next_to_have_waited(view, wait) for wait in waits]
        for placed in reversed(self._placed.values()):
            if placed + self._stay <= now:
                break  # and those before it were placed earlier
            times.append(placed + self._stay)
        return min(times) - EARLY

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        if type(self.replace).cpu_score is Replacement.cpu_score:
            return ()  # they come in this order
        return sorted(candidates, key=lambda name: self.replace.cpu_score(view, view.adapters[name]))

    def _by_urgency(self, view: SchedulerView) -> Iterator[tuple[str, AdapterView, float | None]]:
        """Yield (name, adapter, arrival of its oldest request) of the cold adapters: aged ones by age, then
        the others in the ordering's order."""
        aged: set[str] = set()
        adapters, now = view.adapters, view.now
        if self._by_oldest:
            for name in view.waiting_adapters:
                if name is not None and (adapter := adapters[name]).slot is None:
                    yield name, adapter, adapter.oldest_arrival
            return
        for name in view.waiting_adapters:
            if name is None:
                continue
            adapter = adapters[name]
            if adapter.slot is not None:
                continue
            oldest = adapter.oldest_arrival
            if _waited(oldest, now) < self.max_wait:
                break  # and those after it have waited less
            aged.add(name)
            yield name, adapter, oldest
        for name in self.order.cold(view):
            if name not in aged:
                adapter = adapters[name]
                yield name, adapter, adapter.oldest_arrival

    def _settling(self, view: SchedulerView) -> set[str | None]:
        """Return adapters whose busy slots are not closed yet, because they were placed only recently."""
        if self._stay == 0:
            return set()
        since = view.now - self._stay
        names: set[str | None] = set()
        for name, placed in reversed(self._placed.items()):
            if placed <= since:
                break
            names.add(name)
        return names

    def _assign_slots(
        self, view: SchedulerView
    ) -> tuple[list[Place], list[str], list[str], set[str | None], SlotPool | None]:
        """Assign slots. Returns the slots for cold adapters, the adapters that may leave theirs, the adapters
        to read because a slot is available, the adapters whose slots are closed for cold ones, and the
        remaining slots."""
        place, evict, read = list[Place](), list[str](), list[str]()
        waiting: dict[str, int] = {}
        closed: set[str | None] = set()
        pool: SlotPool | None = None  # made only if there is a cold adapter
        now, load_room = view.now, view.load_room
        lacks: Callable[[AdapterView], bool] | None = None
        soon = inf if self._is_fixed else needed_until(view)
        cold = islice(self._by_urgency(view), SCAN_LIMIT)
        for name, adapter, oldest in cold:
            if pool is None:
                pool = SlotPool(view, self.replace, self._settling(view))
                self._was_full = pool.is_full
            if self._is_fixed and not pool.may_lose_idle(oldest, later=self._by_oldest):
                claims = self._claims(view, chain([(name, adapter, oldest)], cold), pool, place, read)
                closed.update(pool.close_for(claims))
                while pool.num_spare and next(claims, None) is not None:
                    pass  # the slots that can be had at once are still assigned
                break
            waited = _waited(oldest, now)
            may_take, may_close = waited >= self._take_after, waited >= self._close_after
            if oldest is not None and oldest > soon:
                may_take = may_close = False
            if not pool.has_any(oldest, may_take=may_take, may_close=may_close):
                if waited >= self.max_wait or not may_take:
                    break  # later ones have waited less, so they get no slot either
                continue
            location = adapter.location
            if lacks is None and location is Location.DISK:
                lacks = lacking_room(view)
            # The last decision placed these adapters; they are still cold, because there was no room.
            refused = self._refused.get(name, 0) if location is Location.CPU and may_close else 0
            if location is Location.CPU and not refused and (way := pool.take_unwanted(name)) is not None:
                assert way.place is not None
                place.append(way.place)
                evict += way.evict
            elif lacks is not None and location is Location.DISK and not lacks(adapter):
                # There is room in the CPU cache: read it if there will be a slot for it.
                if len(read) < load_room and pool.has_idle(oldest if may_take else None):
                    read.append(name)
            elif location is not Location.LOADING:
                # On disk, and the cache is full: the core evicts from it, if possible.
                if location is Location.DISK and len(read) < load_room:
                    read += [name] if pool.has_idle(oldest if may_take else None) else []
                way = pool.make_way(adapter, oldest, take=may_take, close=may_close, refused=refused)
                closed.update(way.closed)
                if location is Location.CPU:
                    place += [] if way.place is None else [way.place]
                    evict += way.evict
                if refused:
                    waiting[name] = refused
        if not self._is_fixed:
            again = {item.adapter: self._refused.get(item.adapter, -1) + 1 for item in place}
            self._refused = {**waiting, **again}
        return place, evict, read, closed, pool

    def _claims(
        self,
        view: SchedulerView,
        cold: Iterable[tuple[str, AdapterView, float | None]],
        pool: SlotPool,
        place: list[Place],
        read: list[str],
    ) -> Iterator[Claim]:
        """Yield the claims of cold adapters to slots that are busy, the most urgent first, if they may have
        no idle slot of whose adapter there is need. Slots that can be had at once are assigned on the way."""
        now, load_room = view.now, view.load_room
        places, most = view.cpu_room, view.cpu_bytes_room
        for name, adapter, oldest in cold:
            waited, location = 0.0 if oldest is None else now - oldest, adapter.location
            is_last = False
            if not pool.num_spare:
                is_last = waited >= self.max_wait or waited < self._take_after
            else:
                if location is Location.CPU and (way := pool.take_unwanted(name)) is not None:
                    place += [] if way.place is None else [way.place]
                    continue
                if location is Location.DISK and len(read) < load_room:
                    read.append(name)
            if oldest is None or waited < self._close_after:
                if is_last:
                    return
                continue
            missing: int | None = 0
            if location is Location.DISK:  # it takes the place of another one, if there is no room for it
                short = 0 if most is None else adapter.bytes - most
                missing = short if places <= 0 or short > 0 else None
            elif location is Location.LOADING:
                missing = None
            yield oldest, missing, is_last


def _is_full(view: SchedulerView) -> bool:
    """Whether every slot is running, being filled, or pinned."""
    ready = SlotState.READY
    for slot in view.slots:
        if slot.adapter is None or (slot.state is ready and not slot.running and not slot.pinned):
            return False
    return True


def _open_queues(
    view: SchedulerView, place: list[Place], closed: set[str | None], awaited: Sequence[str] | None = None
) -> list[str | None]:
    """Return the adapters whose requests may be admitted: the base model, and those that keep their slots.
    ``awaited``: those in slots that requests wait for, if no others are wanted."""
    slots = view.slots
    leaving = closed | {slots[p.slot].adapter for p in place if p.slot is not None}
    held: Sequence[str | None] | None = awaited
    if held is None:
        ready, draining = SlotState.READY, SlotState.DRAINING
        held = [slot.adapter for slot in slots if (state := slot.state) is ready or state is draining]
    return [None, *(name for name in held if name not in leaving)] if leaving else [None, *held]


def _next_to_have_waited(view: SchedulerView, wait: float) -> float:
    """Return the time at which the next adapter will have been waited for for ``wait`` seconds; infinity if
    none will. The cost does not grow with the number of those that have been already."""
    first = next(_oldest(view, view.waiting_adapters), None)
    if first is None or first + wait > view.now:
        return inf if first is None else first + wait
    found = inf
    for since in _oldest(view, reversed(view.waiting_adapters)):
        if since + wait <= view.now:
            break
        found = since + wait
    return found


def _oldest(view: SchedulerView, names: Iterable[str | None]) -> Iterator[float]:
    """Yield the arrivals of the oldest requests that wait for these adapters."""
    adapters = view.adapters
    for name in names:
        if name is not None and (since := adapters[name].oldest_arrival) is not None:
            yield since


def _waited(oldest: float | None, now: float) -> float:
    return 0.0 if oldest is None else now - oldest
