"""The slots of one decision, for ``Composed``: read once, sorted at most once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from math import inf
from operator import itemgetter
from typing import NamedTuple

from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.policy import (
    AdapterView,
    Location,
    MemoryView,
    Place,
    RequestView,
    SchedulerView,
    SlotState,
    SlotView,
)

SOON = 16
"""Number of requests in the queue beyond which a request is not yet urgent."""
LOOKED_AT = 64
"""Number of requests in the queue that are looked at for that."""
FILL_LIMIT = 32
"""Maximum waiting requests of a closed slot that one decision examines."""


class _Wanted(NamedTuple):
    """A slot that is busy, or whose adapter requests wait for, or both."""

    slot: SlotView
    name: str
    adapter: AdapterView
    oldest: float
    """Arrival of the first request that waits for its adapter; inf if none does."""


_Row = tuple[SlotView, str, AdapterView, float]
"""The fields of a ``_Wanted``; there are as many as slots, and few decisions need more of them."""
_oldest_of = itemgetter(3)


class Way(NamedTuple):
    """A way for an adapter to get a slot."""

    closed: Sequence[str]
    """Adapters whose slots admit no more requests."""
    place: Place | None
    """The slot to take; None: the adapter must wait until the closed slots are idle."""
    evict: Sequence[str]


NO_WAY = Way((), None, ())


Claim = tuple[float, int | None, bool]
"""A cold adapter's claim to a slot that is busy: the arrival of the oldest request that waits for it; the
bytes that must leave the CPU cache first, if more than 0 (None: it cannot be copied yet, so that no slot is
closed for it); and whether no later adapter gets a slot if there is none for it."""


class SlotPool:
    """The slots of one decision that can still be assigned.

    Under an overload a slot is requested for each of many cold adapters, so each answer must not examine all
    slots again. A slot is available if the latest of the slots' oldest waiting requests arrived later.

    Args:
        settling: Adapters whose slots must not be closed yet.
    """

    def __init__(self, view: SchedulerView, replace: Replacement, settling: set[str | None]) -> None:
        self._view = view
        self._replace = replace
        adapters, ready, draining = view.adapters, SlotState.READY, SlotState.DRAINING
        self.awaited: list[str] = []
        """Adapters in slots that requests wait for."""
        free: list[SlotView] = []
        unwanted: list[tuple[SlotView, AdapterView]] = []
        idle: list[_Row] = []
        closable: list[_Row] = []
        for slot in view.slots:
            name = slot.adapter
            if name is None:
                free.append(slot)
            elif (state := slot.state) is ready or state is draining:
                adapter = adapters[name]
                oldest, running = adapter.oldest_arrival, adapter.running
                if oldest is not None:
                    self.awaited.append(name)
                if state is draining or adapter.pinned:
                    continue
                if oldest is None and running == 0:
                    unwanted.append((slot, adapter))
                    continue
                wanted = (slot, name, adapter, inf if oldest is None else oldest)
                if running == 0:
                    idle.append(wanted)
                if name not in settling:
                    closable.append(wanted)
        self._memory = view.memory if view.memory.elastic else None
        self._free = free
        self._unwanted = _by_score(view, replace, unwanted)
        self.num_spare = len(free) + len(unwanted)
        """Slots that are left, free or with adapters that no request waits for."""
        self.num_idle = len(idle)
        """Idle slots that are left, of adapters that requests wait for."""
        self._idle_rows, self._closable_rows = idle, closable
        self._free_bytes = self._unwanted_bytes = 0
        """Free bytes of the memory that slots share, with those of the adapters that may leave."""
        if self._memory is not None:
            self._free_bytes = self._memory.free
            self._unwanted_bytes = sum(self._memory.bytes_of(adapter.name) for _, adapter in unwanted)
        self._gone: set[SlotView] = set()
        """Slots that adapters were given, or are closed for."""
        self._idle = _Candidates(idle, self._gone)
        self._closable = _Candidates(closable, self._gone)

    @property
    def is_full(self) -> bool:
        """Whether every slot is running, being filled, pinned, or assigned, so that none can be had at
        once."""
        return not self.num_spare and not self.num_idle

    def may_lose_idle(self, before: float | None, *, later: bool) -> bool:
        """Whether an adapter that requests have waited for since ``before``, or one of those that come after
        it, may get an idle slot that others wait for. ``later``: they have been waited for no longer."""
        return self.num_idle > 0 and not (later and not self._idle.has(before))

    def has_any(self, before: float | None, *, may_take: bool, may_close: bool) -> bool:
        """Whether there is a slot for an adapter that requests have waited for since ``before``."""
        return (
            self.num_spare > 0
            or (may_close and self._closable.has(before))
            or (may_take and self._idle.has(before))
        )

    def has_idle(self, before: float | None) -> bool:
        """Whether there is a free slot, or an idle one that no request waits for or (given ``before``) only
        later requests."""
        return self.num_spare > 0 or self._idle.has(before)

    def take_unwanted(self, name: str) -> Way | None:
        """Take a free slot, else the least valuable idle one that no request waits for; where slots share a
        memory, have as many such adapters leave as it takes. None if there is no room."""
        if self.num_spare == 0:
            return None
        if self._memory is None:
            slot = self._free.pop(0) if self._free else next(self._unwanted)
            self.num_spare -= 1
            return Way((), Place(name, slot.index), ())
        need = self._memory.bytes_of(name)
        if need > self._free_bytes + self._unwanted_bytes:
            return None
        evict = self._evict_unwanted(self._memory, need)
        self._free_bytes -= need
        self._free.pop(0)
        self.num_spare -= 1
        return Way((), Place(name), evict)

    def _evict_unwanted(self, memory: MemoryView, need: int) -> list[str]:
        """Evict adapters until ``need`` bytes and a slot are free, or all adapters that may leave have
        left."""
        names: list[str] = []
        while need > self._free_bytes or not self._free:
            slot = next(self._unwanted, None)
            if slot is None or slot.adapter is None:
                break
            self._free.append(slot)
            taken = memory.bytes_of(slot.adapter)
            self._free_bytes += taken
            self._unwanted_bytes -= taken
            names.append(slot.adapter)
        return names

    def make_way(
        self, adapter: AdapterView, oldest: float | None, *, take: bool, close: bool, refused: int = 0
    ) -> Way:
        """Close the slots of other adapters for one: idle ones, or busy ones that will be idle soon; several
        if more bytes must leave the CPU cache, or the slots' memory. ``oldest`` is the arrival of its first
        request. ``refused`` is how often the core found no room although enough bytes were free, in holes
        between running adapters. Then that many times as many bytes are closed.

        Where slots share a memory, its free bytes are then reserved for this adapter.
        """
        found: list[_Wanted] = []
        missing, bytes_missing = lacking(self._view, adapter), 0
        memory = self._memory
        if memory is None and missing <= 0:  # nearly always
            wanted = self._next(oldest, take=take, close=close)
            if wanted is None:
                return NO_WAY
            self._gone.add(wanted.slot)
            if wanted.slot.running:
                return Way((wanted.name,), None, ())
            self.num_idle -= 1
            return Way((wanted.name,), Place(adapter.name, wanted.slot.index), ())
        evict: list[str] = []
        if memory is not None:
            bytes_missing = memory.bytes_of(adapter.name) * (1 + refused)
            if take or close:
                evict = self._evict_unwanted(memory, bytes_missing)
            bytes_missing -= self._free_bytes
        # For an adapter that must still be read, at least one must leave the CPU cache.
        enough = memory is not None and adapter.location is Location.CPU and bool(self._free)
        while missing > 0 or bytes_missing > 0 or not (found or enough):
            wanted = self._next(oldest, take=take, close=close)
            if wanted is None:
                break
            self._gone.add(wanted.slot)
            self.num_idle -= not wanted.slot.running
            found.append(wanted)
            missing -= wanted.adapter.bytes
            bytes_missing -= 0 if memory is None else memory.bytes_of(wanted.name)
        if memory is None:
            idle = found and found[0].slot.running == 0
            place = Place(adapter.name, found[0].slot.index) if idle else None
            return Way([wanted.name for wanted in found], place, ())
        if close:
            self.num_spare = 0
        if bytes_missing > 0 and not refused:
            return Way((), None, evict)  # closing these would not be enough
        self._free_bytes = max(0, -bytes_missing)
        idle = all(wanted.slot.running == 0 for wanted in found)
        names = [wanted.name for wanted in found]
        return Way(names, Place(adapter.name) if idle else None, [*evict, *names] if idle else evict)

    def close_for(self, claims: Iterator[Claim]) -> list[str]:
        """Return the adapters whose busy slots are closed for these claims, none of which may have an idle
        one: for each the slot that will be idle soonest, of those that only later requests wait for, or
        several of them. None if that would keep nobody out."""
        if self._view.free_seqs <= 0:
            return []
        rows, first = self._closable_rows.copy(), list[Claim]()
        if self._gone or self._idle_rows:
            gone = self._gone.union([row[0] for row in self._idle_rows])
            rows = [row for row in rows if row[0] not in gone]
        earliest = min(map(_oldest_of, rows), default=inf)
        if earliest == inf:
            return []
        least, left = 0, len(rows)
        for claim in claims:
            first.append(claim)
            if claim[0] >= earliest:
                break
            least += claim[1] is not None
            if least == left:
                return [row[1] for row in rows]  # all of them, in whatever order
        closed: list[str] = []
        self._sort_by_end(rows)
        begin, before = 0, -inf  # no slot before ``begin`` is for a claim since ``before``, or later
        for since, missing, is_last in chain(first, claims):
            begin, before = 0 if since < before else begin, since
            while begin < left and rows[begin][3] <= since:
                begin += 1
            if begin == left and is_last:
                break
            while missing is not None and begin < left:
                _, name, adapter, _ = rows.pop(begin)
                left -= 1
                closed.append(name)
                missing -= adapter.bytes if missing > 0 else 0
                if missing <= 0:
                    break
                while begin < left and rows[begin][3] <= since:
                    begin += 1
        return closed

    def _next(self, oldest: float | None, *, take: bool, close: bool) -> _Wanted | None:
        """Return an idle slot, if only later requests wait for it; else the slot that will be idle
        soonest."""
        wanted = self._idle.first(oldest, self._sort_idle) if take else None
        return self._closable.first(oldest, self._sort_by_end) if wanted is None and close else wanted

    @cached_property
    def tokens_left(self) -> Mapping[str | None, int]:
        return self._view.tokens_left

    def _sort_idle(self, rows: list[_Row]) -> None:
        view, score = self._view, self._replace.score
        rows.sort(key=lambda row: (score(view, row[0], row[2]), row[0].index))

    def _sort_by_end(self, rows: list[_Row]) -> None:
        left = self.tokens_left
        rows.sort(key=lambda row: (left.get(row[1], 0), row[0].last_used))


def _by_score(
    view: SchedulerView, replace: Replacement, slots: Iterable[tuple[SlotView, AdapterView]]
) -> Iterator[SlotView]:
    """Sort lazily, so that nothing is scored when no slot is needed."""
    score = replace.score
    yield from (s for s, _ in sorted(slots, key=lambda pair: (score(view, *pair), pair[0].index)))


class _Candidates:
    """Slots in the order to take them, sorted when the first is asked for. Those in ``gone`` are skipped.

    Nothing here refers to the pool: a pool is made for each decision, and must be freed without a search for
    cycles.
    """

    def __init__(self, rows: list[_Row], gone: set[SlotView]) -> None:
        self._rows = rows
        self._is_sorted = False
        self._gone = gone
        self._begin = 0
        """Rows before it are gone."""
        self._by_arrival: list[_Row] | None = None
        """The same rows, with the latest of the oldest requests at the end."""

    def has(self, before: float | None) -> bool:
        """Whether only requests after ``before`` wait for one of them."""
        if before is None:
            return False
        rows = self._by_arrival
        if rows is None:
            rows = self._by_arrival = sorted(self._rows, key=_oldest_of)
        while rows and rows[-1][0] in self._gone:
            rows.pop()
        return bool(rows) and rows[-1][3] > before

    def first(self, before: float | None, sort: Callable[[list[_Row]], None]) -> _Wanted | None:
        """Return the first, in the order of ``sort``, that only requests after ``before`` wait for."""
        if before is None or not self.has(before):
            return None
        if not self._is_sorted:
            sort(self._rows)
            self._is_sorted = True
        rows, gone = self._rows, self._gone
        while rows[self._begin][0] in gone:
            self._begin += 1
        for row in islice(rows, self._begin, None):
            if row[3] > before and row[0] not in gone:
                return _Wanted._make(row)
        return None


def lacking(view: SchedulerView, adapter: AdapterView) -> int:
    """Return the bytes that must leave the CPU cache before the adapter can be read, as far as its size is
    known."""
    if adapter.location is not Location.DISK:
        return 0
    room = view.cpu_bytes_room
    return 0 if room is None else adapter.bytes - room


def lacking_room(view: SchedulerView) -> Callable[[AdapterView], bool]:
    """Return whether adapters have no room in the CPU cache without an eviction."""
    places, most = view.cpu_room, view.cpu_bytes_room
    if places <= 0:
        return lambda adapter: True
    return lambda adapter: most is not None and adapter.bytes > most


def needed_until(view: SchedulerView) -> float:
    """Return the arrival of the last request that will be admitted soon, of those with adapters in slots.

    Where many adapters share a memory, more of them are idle than can run. If an adapter that is needed soon
    left for a later request, it would only have to be copied again.
    """
    count = 0
    for request in islice(view.waiting, LOOKED_AT):
        name = request.adapter
        count += name is None or view.adapters[name].slot is not None
        if count == SOON:
            return request.arrival
    return inf


def fill(
    view: SchedulerView, closed: set[str | None], tokens_left: Mapping[str | None, int], within: float
) -> list[RequestView]:
    """Return requests for closed slots that end before the running ones do, so that they delay no other
    request."""
    fitting = [
        request
        for name, left in tokens_left.items()  # not in the order of a set, which differs from run to run
        if name in closed
        for request in islice(view.waiting_for(name), FILL_LIMIT)
        if request.max_tokens - request.output_tokens <= left * within
    ]
    return sorted(fitting, key=lambda request: request.arrival)
