"""Brings the parts of mixes into slots, all of a mix at once, without keeping anybody out.

Policies see adapters and slots, and no mixes. A mix runs whenever all of its parts are in slots. Where some
are missing, they are read to the CPU cache first, which holds no slot. Then the mix gets a *turn*: its parts
are copied into slots together, and stay there until the requests that waited for it then have begun. There is
one turn at a time, and these rules:

- First come, first served: no mix gets a turn while a request for an adapter without a slot has waited
  longer.
- A turn takes slots that nobody needs at once. Only after ``MIX_PATIENCE_SECONDS`` it closes others, as few
  as possible: these admit only requests that came before the mix's, and are taken when all of them are idle
  and no such request waits, or ``MIX_LIMIT_SECONDS`` are over.
- Once a request for an adapter without a slot has waited for ``MIX_PATIENCE_SECONDS``, no later request for a
  mix begins outside of a turn. So the slots that a policy closes become idle.
- A policy may leave an adapter without a slot for ever. If a mix has waited behind it for
  ``MIX_LIMIT_SECONDS``, that adapter gets a turn, as a mix of one.
- A read that stalls, or pinned adapters that are in the way, delay only the mixes that need them.
- No turn begins while a pinned adapter waits for a slot that it could have.

So each request for a mix begins after the mixes and adapters that were waited for before it had their turns.
A turn takes at most two of the longest generations (to empty the slots, and for places in the batch), the
copies, and reads to the CPU cache that other adapters filled.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from heapq import merge
from itertools import takewhile
from math import inf
from operator import attrgetter

from aioengine.core.adapters.beside_pinned import fits
from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.slots import Slot
from aioengine.core.queues import RequestQueues
from aioengine.core.state import AdapterEntry, Request, Status
from aioengine.schedulers.policy import Location

MIX_PATIENCE_SECONDS = 1.0
"""Seconds after which a mix whose parts are missing closes the slots of others."""
MIX_LIMIT_SECONDS = 5.0
"""Seconds after which adapters that a mix waits behind are brought in, whatever the policy does."""

_seq = attrgetter("seq")


class Assembly:
    """Decides whose turn it is, and what that keeps others from.

    ``most`` is the number of requests that begin in a turn.
    """

    def __init__(self, residency: Residency, queues: RequestQueues, most: int) -> None:
        self._residency = residency
        self._slots = residency.slots
        self._queues = queues
        self._most = most
        self._turn: AdapterEntry | None = None
        self._window: list[Request] | None = None
        """Requests that have not begun yet since all parts are in slots; None before that."""
        self._leaving: set[int] = set()
        """Uids of adapters that leave their slots for those whose turn it is."""
        self._since: Request | None = None
        """The oldest request for those, while others leave."""
        self.pin_waits = False
        """Whether a pinned adapter takes the next slots that become idle."""
        self._no_room_until = 0.0
        """Until then no slot is closed to make room in the CPU cache, because that was of no use."""

    # What it keeps others from

    @property
    def kept(self) -> set[int]:
        """Uids of adapters that may not leave their slots, because it is their turn."""
        return set() if self._turn is None else {member.uid for member in self._turn.members}

    @property
    def any_waits(self) -> bool:
        """Whether requests wait for mixes."""
        return bool(self._queues.mixes)

    @property
    def has_turn(self) -> bool:
        return self._turn is not None

    @property
    def closes(self) -> bool:
        """Whether slots are closed."""
        return self._since is not None

    def is_closed_to(self, request: Request) -> bool:
        """Whether the request would run in a slot that is to become idle."""
        if self._since is None or request.adapter is None or request.seq < self._since.seq:
            return False
        return any(member.uid in self._leaving for member in request.adapter.members)

    def keeps_from_slots(self, entry: AdapterEntry) -> bool:
        """Whether an adapter gets no slot for now, because slots are kept for one that has waited longer."""
        if self._since is None or self._turn is None or entry in self._turn.members:
            return False
        head = entry.waiting.head
        return head is None or head.seq > self._since.seq

    # Requests to begin

    def ready(self, now: float, is_closed: Callable[[Request], bool]) -> Iterator[Request]:
        """Yield the requests for mixes that can begin, and those whose turn it is, in order of arrival.
        ``is_closed``: whether a request would run in a slot that admits none; such a slot admits no later
        request for the same mix either."""
        turn, window = self._turn, self._window or []
        if turn is None or turn.location is not Location.SLOT:
            window = []  # a part has left for a sequence
        if not self._queues.mixes:
            return iter(window)
        cold = self._first_cold()
        before = inf  # later requests begin only in a turn
        if cold is not None and now - cold.arrival >= MIX_PATIENCE_SECONDS:
            before = cold.seq
        in_slots = {part for part in self._queues.parts if part.location is Location.SLOT}
        in_window = {request.seq for request in window}
        here: list[Sequence[Request] | Iterator[Request]] = [window]
        for seq, mix in self._waiting():
            if seq > before:
                break
            if in_slots.issuperset(mix.members):
                able = takewhile(lambda r: r.seq < before and not is_closed(r), mix.waiting)
                here.append(able if mix is not turn else (r for r in able if r.seq not in in_window))
        return merge(*here, key=_seq)

    # Turns

    def arrange(self, now: float) -> None:
        """Go on with the turn under way, or begin the next one. No step may be in flight."""
        if self._turn is None and not self._queues.mixes:
            self._residency.cpu.reserved = set()
            return  # as nearly always
        before, self._leaving, self._since = self._leaving, set(), None
        turn, window = self._turn, self._window
        if turn is not None and window is not None:
            window = [request for request in window if request.status is Status.WAITING]
            if turn.location is not Location.SLOT:
                window = None  # a part has left for a sequence
        waits = turn is not None and bool(turn.waiting if window is None else window)
        if turn is None or not waits or (window is None and _is_loading(turn)):
            turn, window = self._choose(now), None
        self._turn, self._window = turn, window
        if turn is not None and window is None and not self._go_on(turn, now, before):
            self._turn = None
        reserved = self.kept
        if (first := self._first_late(now)) is not None:
            reserved |= {part.uid for part in first.members}
        self._residency.cpu.reserved = reserved

    def reads(self, now: float, *, waited: float) -> Iterator[AdapterEntry]:
        """Yield the parts to read of the mixes that have waited for so many seconds, each once."""
        on_disk = {part for part in self._queues.parts if part.location is Location.DISK}
        for mix in self._queues.mixes.values():
            if not on_disk or now - _arrival(mix) < waited:
                return
            if not mix.stalls:  # otherwise the others have time
                for part in mix.members:
                    if part in on_disk:
                        on_disk.remove(part)
                        yield part

    def next_due(self, now: float) -> float | None:
        """Return when the next mix will have waited long."""
        mixes = self._queues.mixes.values()
        if not mixes:
            return None
        times = [self._no_room_until] if self._no_room_until > now else []
        for until in (_patient_until, _limit_of):
            first = bisect_right(mixes, now, key=until)
            if first < len(mixes):
                times.append(until(mixes[first]))
        return min(times, default=None)

    def _choose(self, now: float) -> AdapterEntry | None:
        """Return whose turn it is."""
        if self.pin_waits:
            return None
        cold = self._first_cold()
        held = [slot.entry for slot in self._slots.slots if slot.entry is not None]
        idle = sum(not (entry.running or entry.stays or entry.is_wanted) for entry in held)
        at_once = len(self._slots.slots) - len(held) + idle
        for seq, mix in self._waiting():
            waited = now - _arrival(mix)
            if waited < MIX_PATIENCE_SECONDS and not at_once:
                return None  # no slot is idle, and those after it have waited less
            if _is_loading(mix):
                continue  # others need not wait for its reads
            if cold is not None and cold.seq < seq:
                return None if waited < MIX_LIMIT_SECONDS or cold.adapter is None else cold.adapter.home
            missing = [part for part in mix.members if part.slot is None]
            late = waited >= MIX_PATIENCE_SECONDS
            if any(part.location is Location.DISK for part in missing):
                if late and now >= self._no_room_until and self._lacks_room(mix, now):
                    return mix
            elif not missing and late:
                return mix
            elif missing and (late or len(missing) <= at_once):
                plan = self._plan(mix, missing, (), at_once=not late)
                if plan is not None:
                    return mix
        return None

    def _waiting(self) -> Iterable[tuple[int, AdapterEntry]]:
        """Return the mixes that requests wait for, with the ``seq`` of the oldest one, in order."""
        found: Iterable[tuple[int, AdapterEntry]] = self._queues.mixes.items()
        return found

    def _first_late(self, now: float) -> AdapterEntry | None:
        """Return the first mix that has waited long, if nobody waits before it, and none of its reads
        stalls."""
        cold = self._first_cold()
        for seq, mix in self._waiting():
            if now - _arrival(mix) < MIX_PATIENCE_SECONDS or (cold is not None and cold.seq < seq):
                return None
            if not mix.stalls:
                return mix
        return None

    def _lacks_room(self, entry: AdapterEntry, now: float) -> bool:
        """Read what can be read; returns whether the CPU cache has no room for the rest."""
        own = {member.uid for member in entry.members}
        refused = [
            self._residency.start_load(part, now, own)
            for part in entry.members
            if part.location is Location.DISK
        ]
        return "cpu_cache_full" in refused

    def _first_cold(self) -> Request | None:
        """Return the oldest request for an adapter that has no slot, and is not being read."""
        entries: Iterable[AdapterEntry | None] = self._queues.heads.values()
        for entry in entries:
            if entry is not None and entry.slot is None and entry.location is not Location.LOADING:
                return entry.waiting.head
        return None

    def _go_on(self, turn: AdapterEntry, now: float, before: set[int]) -> bool:
        """Bring in what is missing; returns whether the turn goes on."""
        missing = [part for part in turn.members if part.slot is None]
        if not missing:
            if turn.location is Location.SLOT:
                self._window = list(turn.waiting)[: self._most]
            return True
        if _is_loading(turn):
            return False  # its read has begun for another mix
        on_disk = any(part.location is Location.DISK for part in missing)
        if on_disk and not self._lacks_room(turn, now):
            return False
        slots = self._plan(turn, missing, before, at_once=False)
        if slots is None:
            self._no_room_until = now + MIX_PATIENCE_SECONDS
            return False
        self._leaving = {slot.entry.uid for slot in slots if slot.entry is not None}
        self._since = head = turn.waiting.head
        assert head is not None
        if now - head.arrival < MIX_LIMIT_SECONDS and any(_waits_before(head, slot.entry) for slot in slots):
            return True
        if not on_disk and all(slot.idle for slot in slots):
            self._copy(turn, slots, now)
            self._leaving, self._since = set(), None
        return True

    def _plan(
        self,
        turn: AdapterEntry,
        missing: Sequence[AdapterEntry],
        before: Collection[int],
        *,
        at_once: bool,
    ) -> list[Slot] | None:
        """Return the slots to empty so that all ``missing`` have room, as few as possible; None if there is
        no way. Those in ``before`` are preferred, so that a plan stays the same. ``at_once``: only slots that
        nobody needs."""
        own = turn.members
        held = [(s, s.entry) for s in self._slots.slots if s.entry is not None and s.entry not in own]
        if at_once:
            may_go = [s for s, entry in held if s.idle and not entry.stays and not entry.is_wanted]
            may_go.sort(key=lambda s: s.last_used)
        else:
            since = _arrival(turn)
            rows = [
                (
                    entry.uid not in before,
                    (entry.oldest_arrival or since) < since,
                    not slot.idle,
                    entry.is_wanted,
                    entry.running,
                    slot.last_used,
                    slot.index,
                )
                for slot, entry in held
                if not entry.stays
            ]
            may_go = [self._slots.slots[row[-1]] for row in sorted(rows)]
        free = sum(slot.entry is None for slot in self._slots.slots)
        least = len(missing) - free
        if any(part.location is Location.DISK for part in missing):  # the CPU cache has no room for it
            least = max(least, 1)
            may_go = [slot for slot in may_go if not slot.idle]  # these would have left the cache
        counts = range(max(0, least), len(may_go) + 1)
        found = bisect_left(counts, True, key=lambda n: self._has_room(missing, may_go[:n]))
        if found < len(counts):
            return may_go[: counts[found]]
        if at_once or self._slots.arena is None or len(may_go) < least:
            return None
        # The parts that are there lie in the way, and must be copied again.
        there = [s for s in self._slots.slots if s.entry is not None and s.entry in own and not s.entry.stays]
        together = [*missing, *(s.entry for s in there if s.entry is not None)]
        return [*may_go, *there] if self._has_room(together, [*may_go, *there]) else None

    def _has_room(self, missing: Sequence[AdapterEntry], leaving: Sequence[Slot]) -> bool:
        """Whether the bytes of all ``missing`` have room once ``leaving`` are gone."""
        arena = self._slots.arena
        if arena is None:
            return True
        offsets = [slot.offset for slot in leaving if slot.offset is not None]
        return fits(arena, offsets, missing) is not None

    def _copy(self, turn: AdapterEntry, slots: Sequence[Slot], now: float) -> None:
        """Begin all copies."""
        residency, arena = self._residency, self._slots.arena
        for slot in slots:
            residency.evict_slot(slot, now)
        missing = [part for part in turn.members if part.slot is None]
        if arena is not None:
            in_order = fits(arena, (), missing)
            assert in_order is not None, "there was room"
            missing = in_order
        for part in missing:
            free_slot = self._slots.free_slot
            assert free_slot is not None
            residency.start_copy(part, free_slot, now)

    def check(self) -> None:
        """Assert that a turn is of requests that wait."""
        if self._window is not None:
            assert self._turn is not None
            assert all(request.adapter is not None for request in self._window)
        assert self._since is None or (self._turn is not None and self._window is None)


def _arrival(entry: AdapterEntry) -> float:
    """Return the arrival of the oldest request that waits for it."""
    oldest = entry.oldest_arrival
    assert oldest is not None
    return oldest


def _patient_until(entry: AdapterEntry) -> float:
    return _arrival(entry) + MIX_PATIENCE_SECONDS


def _limit_of(entry: AdapterEntry) -> float:
    return _arrival(entry) + MIX_LIMIT_SECONDS


def _waits_before(request: Request, entry: AdapterEntry | None) -> bool:
    """Whether a request that came earlier waits for this adapter."""
    head = None if entry is None else entry.waiting.head
    return head is not None and head.seq < request.seq


def _is_loading(entry: AdapterEntry) -> bool:
    return any(part.location is Location.LOADING for part in entry.members)
