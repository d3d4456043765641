"""Locations of adapters, and their moves: disk -> CPU cache -> slot, and back out.

This is bookkeeping only. It says which moves to start; the shell carries them out and reports back
through ``loaded``, ``load_failed``, and the slot table's ``placed`` and ``place_failed``.
"""

from __future__ import annotations

from collections.abc import Collection

from aioengine import events
from aioengine.core.adapters.cpu_cache import CpuCache, Order
from aioengine.core.adapters.moves import DropMove, LoadMove, Move, StopMove
from aioengine.core.adapters.name import NameTable
from aioengine.core.adapters.slots import SlotTable
from aioengine.core.adapters.version import Life, State
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterError, AdapterTooLarge, frameless
from aioengine.schedulers.policy import Location
from aioengine.step import LoadedAdapter


class Residency:
    """All versions of adapters, and where they are. ``known`` are those that policies know, by name, and
    ``cpu_order`` the order of eviction from the CPU cache."""

    def __init__(
        self, limits: CoreLimits, known: dict[str, AdapterEntry], guard: PolicyGuard, cpu_order: Order
    ) -> None:
        self._moves: list[Move] = []
        self.slots = SlotTable(limits, self._moves, guard)
        self.cpu = CpuCache(limits, cpu_order, self._moves, guard)
        self.names = NameTable(limits.num_slots, known, guard)
        self.current = self.names.current
        """Published entries by name; new requests use these."""
        self.entries = self.names.entries
        self.wanted = self.names.wanted
        self.load_room = limits.max_loads
        """Number of reads that may be started now."""
        self._max_loads = limits.max_loads
        self._guard = guard

    def sweep(self, now: float) -> None:
        """Free every retired adapter that nothing uses any more, and cancel its reads."""
        for entry in list(self.names.retired.values()):
            if entry.location is Location.LOADING and not entry.waiting:
                self.load_cancelled(entry)
                self._moves.append(StopMove(entry))
            if entry.waiting or entry.running or entry.state is State.COPYING:
                continue
            if entry.location in (Location.CPU, Location.SLOT):
                self._evict(entry, now)
            entry.change("free")
            del self.names.retired[entry.uid], self.entries[entry.uid]
            self.slots.large.discard(entry.uid)
            entry.files = None
            if entry.published:
                self.names.forget(entry)
            self._guard.say(events.AdapterUnloaded, entry, now)

    def replaced(self) -> list[AdapterEntry]:
        """Return the versions that requests wait for or run on although there is a later one."""
        return [e for e in self.names.retired.values() if e.published and e.label in self.current]

    def set_size(self, entry: AdapterEntry, nbytes: int, slot_nbytes: int) -> None:
        """Set the bytes that an adapter takes in the CPU cache and in a slot, which it may not be in now."""
        entry.nbytes, entry.slot_nbytes = nbytes, slot_nbytes
        entry.places = self.slots.places_of(slot_nbytes)
        (self.slots.large.add if entry.places > 1 else self.slots.large.discard)(entry.uid)

    # Reads that callers ask for

    def refuse_shut_out(self, now: float) -> None:
        """Fail wanted adapters when pinned adapters fill the CPU cache, because nothing else could ever be
        read into it."""
        pinned = [entry.label for entry in self.cpu.entries.values() if entry.pinned]
        if len(pinned) < self.cpu.capacity:
            return
        why = f"cannot be loaded, because pinned adapters fill the CPU cache ({', '.join(pinned)})"
        for entry in list(self.wanted.values()):
            if entry.location is Location.DISK and not entry.pinned:
                self.names.forget_want(entry)
                error = entry.shut_out(why, "unpin one, or raise LoRAConfig.max_cpu_loras")
                self.fail(entry, now, error, "too_large")  # those who wait for it hear of it
                if entry.life is Life.NEW:
                    self.names.of(entry.label).retire(entry, now)

    def start_wanted(self, now: float, keep: Collection[int], *, waited: float = 0.0) -> None:
        """Begin the reads that were asked for at least ``waited`` seconds ago, as far as there is room."""
        for entry in list(self.wanted.values()):
            if entry.wanted_since is not None and now - entry.wanted_since >= waited:
                self.start_load(entry, now, keep)

    # Reads

    def start_load(
        self, entry: AdapterEntry, now: float, keep: Collection[int], offered: Collection[AdapterEntry] = ()
    ) -> None:
        """Begin a read if there is room, evicting others if needed, but no adapter whose uid is in ``keep``
        from its slot. Those ``offered`` may be evicted even if requests wait for them. An adapter that has
        failed is read only for those who wait for it: a policy that reads ahead would retry it without
        pause."""
        again = entry.error is not None and entry.needed_since is None
        if entry.location is not Location.DISK or again or not self.load_room:
            return
        if self._make_room(entry, now, keep, offered):
            self.cpu.add(entry)
            entry.change("read")
            self.load_room -= 1
            self._moves.append(LoadMove(entry))
            self._guard.say(events.AdapterLoading, entry, now)

    def _make_room(
        self,
        entry: AdapterEntry,
        now: float,
        keep: Collection[int] = (),
        offered: Collection[AdapterEntry] = (),
    ) -> bool:
        """Evict others from the CPU cache, if that is needed. Returns False if too few can be now."""
        if self.cpu.fits(entry):
            return True
        victims = self.cpu.victims(entry, now, keep, offered)
        for victim in victims or ():
            self._evict(victim, now)
        return victims is not None

    def _evict(self, entry: AdapterEntry, now: float) -> None:
        """Evict an adapter from its slot, if it has one, and from the CPU cache."""
        if entry.slot is not None:
            self.slots.evict(self.slots.slot_of(entry), now)
        self.cpu.evict(entry, now)

    def load_stalled(self, entry: AdapterEntry) -> None:
        """Note that a read makes no progress. It goes on, but another may start in its place."""
        entry.change("stall")
        self._guard.changes += 1
        self.load_room += 1
        self.cpu.remove(entry)

    def load_cancelled(self, entry: AdapterEntry) -> None:
        """Note that a read was cancelled; no request is told."""
        self._guard.changes += 1
        if not entry.stalled:
            self.load_room += 1
            self.cpu.remove(entry)
        entry.change("give up")

    def refusal(self, entry: AdapterEntry, found: LoadedAdapter) -> AdapterError | None:
        """Return the reason if what was read may not be used, or can never be kept."""
        if entry.expected not in ("", found.digest):
            why = f"since it was loaded: their SHA-256 is {found.digest[:12]}..., and "
            return entry.changed(f"{why}{entry.expected[:12]}... is expected; load it again with replace")
        arena, nbytes = self.slots.arena, found.slot_nbytes
        if arena.rounded(nbytes) > arena.size:
            todo = "raise LoRAConfig.slot_memory or, without it, max_loras or max_lora_rank"
            why = f"{nbytes:,} bytes in the slots, which have {arena.size:,} in all; {todo}"
            return entry.too_large(why)
        return self.cpu.refusal(entry, found.nbytes, self.slots.places_of(nbytes))

    def loaded(self, entry: AdapterEntry, now: float, found: LoadedAdapter) -> AdapterError | None:
        """Take in an adapter that has been read. Returns the reason if it is not kept. Others are evicted if
        the cache's bounds would be exceeded. If too few can be evicted now, it is dropped, and read again
        when there is room: its size is known now."""
        error = self.refusal(entry, found)
        if error is not None:
            self.load_failed(entry, now, error, "too_large" if isinstance(error, AdapterTooLarge) else "io")
            self._moves.append(DropMove(entry))
            return error
        if entry.stalled:  # another read may have its place
            self.cpu.add(entry)
        else:
            self.load_room += 1
        entry.change("arrive")
        self.names.of(entry.label).succeed()
        self.set_size(entry, found.nbytes, found.slot_nbytes)
        entry.take(found)
        entry.error, entry.last_used = None, now
        took = {"rank": found.rank, "nbytes": found.nbytes, "seconds": found.seconds}
        self._guard.say(events.AdapterLoaded, entry, now, **took)
        self.cpu.resize(entry)
        if not self._make_room(entry, now):
            self.cpu.evict(entry, now)
            return None
        self.names.forget_want(entry)
        if entry.published:
            self._guard.tell("adapter_loaded", now, adapter=entry.name)
        return None

    def load_failed(
        self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure
    ) -> None:
        self.load_cancelled(entry)
        self.names.forget_want(entry)
        self.fail(entry, now, error, reason)
        if isinstance(entry.error, AdapterError) and entry.waiting:  # what is loaded by name is always read
            self.names.of(entry.label).fail(entry.error, now)
        lost = entry.source is not None and not entry.pinned and reason in ("io", "invalid")
        if entry.life is Life.NEW or (lost and not entry.retired):
            self.names.of(entry.label).retire(entry, now)

    def fail(self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure) -> None:
        """Note why an adapter is not where it is wanted."""
        entry.error = frameless(error)
        self._guard.say(events.AdapterFailed, entry, now, reason=reason, error=entry.error)

    def place_failed(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        """Note that a copy into a slot has failed."""
        self.slots.cancel(entry)
        entry.copy_failed = now
        self.fail(entry, now, error, "internal")

    # Common

    def device_lost(self, now: float) -> None:
        """Forget everything in the CPU cache, in slots and under way, because the device's processes are
        gone. Adapters that were asked for by name, and pinned ones, are read again."""
        for entry in self.entries.values():
            if entry.location is Location.LOADING:
                self.load_cancelled(entry)
        for entry in list(self.cpu.entries.values()):
            if entry.state is State.COPYING:
                self.slots.cancel(entry)
            self._evict(entry, now)
        for entry in self.current.values():
            if entry.pinned and entry.wanted_since is None:
                self.names.of(entry.label).load(now, entry)
        self._moves.clear()

    def take_moves(self) -> list[Move]:
        moves = self._moves[:]
        self._moves.clear()
        return moves

    def check(self) -> None:
        self.slots.check()
        self.cpu.check()
        loading = sum(e.location is Location.LOADING and not e.stalled for e in self.entries.values())
        assert 0 <= self.load_room == self._max_loads - loading
        assert self.names.pinned == sum(entry.pinned for entry in self.entries.values())
        assert {**self.names.known, **self.current} == self.names.known
        for entry in self.entries.values():
            assert (self.names.known.get(entry.name) is entry) == entry.published
            assert (entry.uid in self.slots.large) == (self.slots.places_of(entry.slot_nbytes) > 1)
            assert entry.published or not (entry.waiting or entry.running)
            outside = entry.location is Location.DISK or entry.stalled
            assert outside == (entry.uid not in self.cpu.entries)
            assert entry.running == 0 or entry.location is Location.SLOT
