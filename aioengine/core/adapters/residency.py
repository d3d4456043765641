"""Locations of adapters, and their moves: disk -> CPU cache -> slot, and back out.

This is bookkeeping only. It says which moves to start; the shell carries them out and reports back
through ``loaded``, ``load_failed``, ``placed`` and ``place_failed``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from aioengine import events
from aioengine.core.adapters.arena import Window
from aioengine.core.adapters.cpu_cache import CpuCache, Order, least_recently_used
from aioengine.core.adapters.failures import frameless
from aioengine.core.adapters.known import KnownAdapters
from aioengine.core.adapters.moves import CopyMove, DropMove, LoadMove, Move, ReleaseMove, StopMove
from aioengine.core.adapters.name import NameTable
from aioengine.core.adapters.pins import Pins
from aioengine.core.adapters.slots import Slot, SlotTable
from aioengine.core.adapters.version import Change, Life, State
from aioengine.core.guard import Tell
from aioengine.core.state import AdapterEntry, AdapterFiles
from aioengine.errors import AdapterChanged, AdapterError, AdapterTooLarge, EngineOverloaded
from aioengine.schedulers.policy import Location
from aioengine.step import LoadedAdapter


class Residency:
    def __init__(
        self,
        *,
        num_slots: int,
        cpu_capacity: int,
        max_loads: int,
        emit: Callable[[events.Event], None],
        tell: Tell,
        slot_bytes: int,
        slot_memory: int | None = None,
        cpu_max_bytes: int | None = None,
        cpu_order: Order = least_recently_used,
    ) -> None:
        self.slots = SlotTable(num_slots, slot_bytes, slot_memory)
        self.cpu = CpuCache(cpu_capacity, num_slots, cpu_max_bytes, cpu_order)
        self.names = NameTable()
        self.current = self.names.current
        """Published entries by name; new requests use these."""
        self.pins = Pins(num_slots, self.names, emit)
        self.by_policy_name = KnownAdapters()
        """All entries that requests may wait for or run on, superseded ones included."""
        self.entries: dict[int, AdapterEntry] = {}
        self._retired: dict[int, AdapterEntry] = {}
        self._wanted: dict[int, AdapterEntry] = {}
        self._next_uid = 0
        self._max_loads = max_loads
        self._loads = 0
        self._moves: list[Move] = []
        self._emit = emit
        self._tell = tell

    # Registration

    def declare(
        self,
        name: str,
        path: str,
        *,
        found: bool = False,
        files: AdapterFiles | None = None,
        version: int | None = None,
    ) -> AdapterEntry:
        """Declare a new version of ``name``. No request can use it until it is published, which happens at
        the latest when it has been read, unless it is ``held``. ``found``: whether a resolver found its path.
        ``files``: read in place of a folder. ``version`` None: the next one of this name."""
        if version is None:
            version = self.names.next_version(name)
        entry = AdapterEntry(self._next_uid, name, version, path, found=found, files=files)
        self._next_uid += 1
        self.entries[entry.uid] = entry
        return entry

    def publish(self, entry: AdapterEntry, now: float) -> None:
        """Let new requests use this version, and give it its predecessor's pin. The predecessor only finishes
        its accepted requests."""
        entry.change(Change.PUBLISH)
        name = self.names.of(entry.label)
        old = name.current
        if old is None:
            entry.expected = name.expected
        else:
            name.expected = ""
            self.pins.hand_over(old, entry, now)
            self.retire(old, now)
        self.names.publish(entry)
        self.by_policy_name[entry.name] = entry
        if entry.location is Location.CPU:
            self._tell("adapter_loaded", now, adapter=entry.name)
        self._emit(
            events.AdapterRegistered(
                time=now,
                adapter=entry.name,
                version=entry.version,
                path=entry.path,
                replaces=None if old is None else old.version,
            )
        )

    def expect(self, name: str, digest: str) -> None:
        """Refuse any other content under this name, until it is replaced or unloaded."""
        known = self.names.of(name)
        known.expected = digest
        known.succeed()  # whatever has failed, it was of other files
        if known.current is not None:
            known.current.expected = digest

    def retire(self, entry: AdapterEntry, now: float) -> None:
        """Accept no new requests on it; it is freed when the accepted ones have ended (see ``sweep``)."""
        entry.change(Change.RETIRE)
        if entry.pinned:
            self.pins.unpin(entry, now)
        self.forget_want(entry)
        self._retired[entry.uid] = entry
        renamed = self.current.get(entry.name) is entry
        if renamed:
            self.names.withdraw(entry)
            del self.by_policy_name[entry.name]
            entry.name = f"{entry.label}@{entry.version}"
            self.by_policy_name[entry.name] = entry
        self.slots.retired(entry)
        if renamed:
            self._tell("adapter_retired", now, adapter=entry.name, was=entry.label)

    def sweep(self, now: float) -> None:
        """Free every retired adapter that nothing uses any more, and cancel its reads."""
        for entry in list(self._retired.values()):
            if entry.location is Location.LOADING and not entry.waiting:
                self.load_cancelled(entry)
                self._moves.append(StopMove(entry))
            if entry.waiting or entry.running or entry.state is State.COPYING:
                continue
            if entry.slot is not None:
                self.evict_slot(self.slots.slots[entry.slot], now)
            if entry.location is Location.CPU:
                self._evict_cpu(entry, now)
            self._free(entry, now)

    def _free(self, entry: AdapterEntry, now: float) -> None:
        entry.change(Change.FREE)
        del self._retired[entry.uid]
        del self.entries[entry.uid]
        self.slots.large.discard(entry.uid)
        if entry.files is not None:
            self._moves.append(ReleaseMove(entry.files))
        if self.is_known(entry):
            del self.by_policy_name[entry.name]
        self._emit(events.AdapterUnloaded(time=now, adapter=entry.label, version=entry.version))

    def replaced(self) -> list[AdapterEntry]:
        """Return the versions that requests wait for or run on although there is a later one."""
        return [e for e in self._retired.values() if self.is_known(e) and e.label in self.current]

    # Disk -> CPU

    @property
    def load_room(self) -> int:
        """Number of reads that may be started now."""
        return self._max_loads - self._loads

    def want(self, entry: AdapterEntry, now: float, *, pin: bool = False) -> None:
        """Bring the adapter to the CPU cache as soon as there is room, although no request waits for it, and
        pin it there. If it is already being read and there is no room when it arrives, it is read again.
        ``entry.error`` tells whether it failed."""
        if entry.location is Location.DISK or entry.location is Location.LOADING:
            entry.error = None
            entry.wanted_since = now
            entry.pin_when_read = pin
            self._wanted[entry.uid] = entry
            self._refuse_shut_out(now)
        elif pin:
            self._pin(entry, now)

    @property
    def any_wanted(self) -> bool:
        """Whether a caller waits for an adapter to be read."""
        return bool(self._wanted)

    def forget_want(self, entry: AdapterEntry) -> None:
        entry.wanted_since = None
        entry.pin_when_read = False
        self._wanted.pop(entry.uid, None)

    def _pin(self, entry: AdapterEntry, now: float) -> None:
        entry.error = None
        self.pins.pin(entry, now)
        self._refuse_shut_out(now)

    def _refuse_shut_out(self, now: float) -> None:
        """Fail wanted adapters when pinned adapters fill the CPU cache, because nothing else could ever be
        read into it."""
        pinned = [entry.label for entry in self.cpu.entries.values() if entry.pinned]
        if len(pinned) < self.cpu.capacity:
            return
        todo = f"({', '.join(pinned)}); unpin one, or raise LoRAConfig.max_cpu_loras"
        for entry in list(self._wanted.values()):
            if entry.location is Location.DISK and not entry.pinned:
                self.forget_want(entry)
                entry.error = EngineOverloaded(
                    f"adapter {entry.label!r} ({entry.path}) cannot be loaded, because pinned adapters fill "
                    f"the CPU cache {todo}",
                    bound="pinned",
                )
                if entry.life is Life.NEW:
                    self.retire(entry, now)

    def start_wanted(self, now: float, keep: set[int], *, waited: float = 0.0) -> None:
        """Begin the reads that were asked for at least ``waited`` seconds ago, as far as there is room."""
        for entry in list(self._wanted.values()):
            if entry.wanted_since is not None and now - entry.wanted_since >= waited:
                self.start_load(entry, now, keep)

    def start_load(
        self, entry: AdapterEntry, now: float, keep: set[int], offered: Collection[AdapterEntry] = ()
    ) -> str | None:
        """Begin a read, evicting others if needed, but no adapter whose uid is in ``keep`` from its slot.
        Returns the reason if it cannot begin. Those ``offered`` may be evicted even if requests wait for
        them."""
        if entry.location is not Location.DISK:
            return "already_loaded"
        if entry.error is not None and entry.needed_since is None:
            return "failed_before"  # otherwise a policy that reads ahead would retry it without pause
        if self._loads >= self._max_loads:
            return "loads_at_limit"
        if not self.cpu.fits(entry) and not self._make_room(entry, now, keep, offered):
            return "cpu_cache_full"
        self.cpu.add(entry)
        entry.change(Change.READ)
        self._loads += 1
        self._moves.append(LoadMove(entry))
        self._emit(events.AdapterLoading(time=now, adapter=entry.label, version=entry.version))
        return None

    def _make_room(
        self, entry: AdapterEntry, now: float, keep: set[int], offered: Collection[AdapterEntry] = ()
    ) -> bool:
        victims = self.cpu.victims(entry, now, keep, offered)
        for victim in victims or ():
            if victim.slot is not None:
                self.evict_slot(self.slots.slots[victim.slot], now)
            self._evict_cpu(victim, now)
        return victims is not None

    def load_stalled(self, entry: AdapterEntry) -> None:
        """Note that a read makes no progress. It goes on, but another may start in its place."""
        entry.change(Change.STALL)
        self._loads -= 1
        self.cpu.remove(entry)

    def loaded(self, entry: AdapterEntry, now: float, found: LoadedAdapter) -> None:
        """Take in an adapter that has been read. Others are evicted if ``max_bytes`` would be exceeded. If
        too few can be evicted now, it is dropped, and read again when there is room: its size is known
        now."""
        stalled = entry.stalled
        entry.change(Change.ARRIVE)
        if (name := self.names.find(entry.label)) is not None:
            name.succeed()
        entry.error = None
        self.set_size(entry, found.nbytes, found.bytes_in_slot)
        if stalled:
            if not self.cpu.fits(entry) and not self._make_room(entry, now, set()):
                entry.change(Change.DROP)
                self._moves.append(DropMove(entry))
                self._refuse_shut_out(now)
                return
            self.cpu.add(entry)
        else:
            self._loads -= 1
        entry.take(found)
        entry.last_used = now
        self._emit(
            events.AdapterLoaded(
                time=now,
                adapter=entry.label,
                version=entry.version,
                rank=found.rank,
                nbytes=found.nbytes,
                seconds=found.seconds,
            )
        )
        if self.cpu.resize(entry) or self._make_room(entry, now, set()):
            pin = entry.pin_when_read
            self.forget_want(entry)
            if entry.life is Life.NEW and not entry.held:
                self.publish(entry, now)
            elif self.is_known(entry):
                self._tell("adapter_loaded", now, adapter=entry.name)
            if pin:
                self._pin(entry, now)
        else:
            self._evict_cpu(entry, now)
            self._refuse_shut_out(now)

    def set_size(self, entry: AdapterEntry, nbytes: int, slot_nbytes: int) -> None:
        """Set the bytes that an adapter takes in the CPU cache and in a slot, which it may not be in now."""
        entry.nbytes, entry.slot_nbytes = nbytes, slot_nbytes
        entry.places = self.slots.places_of(slot_nbytes)
        if entry.places > 1:
            self.slots.large.add(entry.uid)
        else:
            self.slots.large.discard(entry.uid)

    def load_failed(
        self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure
    ) -> None:
        self.load_cancelled(entry)
        self.forget_want(entry)
        self._failed(entry, now, error, reason)
        if isinstance(entry.error, AdapterError) and entry.waiting:  # what is loaded by name is always read
            self.names.fail(entry.label, entry.error, now)
        lost = entry.found and not entry.pinned and reason in ("io", "invalid")
        if entry.life is Life.NEW or (lost and not entry.retired):
            self.retire(entry, now)

    def changed(self, entry: AdapterEntry, digest: str) -> AdapterChanged | None:
        """Why what was read may not be used: it is not the content that is expected."""
        if entry.expected in ("", digest):
            return None
        return AdapterChanged(
            f"its files have changed since it was loaded: their SHA-256 is {digest[:12]}..., and "
            f"{entry.expected[:12]}... is expected; load it again with replace",
            name=entry.label,
            path=entry.path,
            transient=True,
        )

    def refusal(self, entry: AdapterEntry, slot_nbytes: int) -> AdapterTooLarge | None:
        """Return the reason if it can never be in a slot."""
        arena = self.slots.arena
        if arena.rounded(slot_nbytes) <= arena.size:
            return None
        return AdapterTooLarge(
            f"it takes {slot_nbytes:,} bytes in the slots, which have {arena.size:,} in all; raise "
            "LoRAConfig.slot_memory or, without it, max_loras or max_lora_rank",
            name=entry.label,
            path=entry.path,
        )

    def pin_refused(self, entry: AdapterEntry, now: float, room: int) -> None:
        """Fail a pinned adapter that gets no slot, because other pinned ones leave only ``room`` bytes."""
        text = f"it takes {entry.slot_nbytes:,} bytes in a slot, and the pinned adapters leave {room:,} bytes"
        text += " at a place; unpin one, or raise LoRAConfig.slot_memory"
        self._failed(entry, now, AdapterTooLarge(text, name=entry.label, path=entry.path), "too_large")

    def load_refused(self, entry: AdapterEntry, now: float, error: AdapterError) -> None:
        """Fail an adapter that was read and is not kept."""
        self.load_failed(entry, now, error, "too_large" if isinstance(error, AdapterTooLarge) else "io")
        self._moves.append(DropMove(entry))

    def load_cancelled(self, entry: AdapterEntry) -> None:
        """Note that a read was cancelled."""
        stalled = entry.stalled
        entry.change(Change.GIVE_UP)
        if not stalled:
            self._loads -= 1
            self.cpu.remove(entry)

    def device_lost(self, now: float) -> None:
        """Forget everything in the CPU cache, in slots and under way, because the device's processes are
        gone. Adapters that were asked for by name, and pinned ones, are read again."""
        for entry in self.entries.values():
            if entry.location is Location.LOADING:
                self.load_cancelled(entry)
        for entry in list(self.cpu.entries.values()):
            if entry.state is State.COPYING and entry.slot is not None:
                self._cancel_copy(self.slots.slots[entry.slot], entry, now)
            elif entry.slot is not None:
                self.evict_slot(self.slots.slots[entry.slot], now)
            self._evict_cpu(entry, now)
        for entry in self.current.values():
            if entry.pinned and entry.wanted_since is None:
                self.want(entry, now)
        self._moves = [move for move in self._moves if isinstance(move, ReleaseMove)]

    # CPU -> slot

    def start_copy(self, entry: AdapterEntry, slot: Slot, now: float, window: Window | None = None) -> None:
        """Begin a copy into a slot that is free or idle. The slots' memory must have room: now, or once the
        adapters of ``window`` are moved together."""
        first = len(self._moves)
        if slot.entry is not None:
            self.evict_slot(slot, now)
        if window is not None:
            self._compact(window, now)
        offset = self.slots.begin(slot, entry)
        self._moves.insert(first, CopyMove(entry, slot.index, offset))  # before those that are moved
        self._emit(
            events.AdapterPlacing(time=now, adapter=entry.label, version=entry.version, slot=slot.index)
        )

    def _compact(self, window: Window, now: float) -> None:
        """Begin to move the idle adapters of a window to its beginning. Each is copied again from CPU memory,
        so its old place may be overwritten."""
        by_offset = {slot.offset: slot for slot in self.slots.slots}
        moving = [(slot, self.slots.release(slot)) for slot in (by_offset[at] for at in window.regions)]
        at = window.begin
        for slot, entry in moving:
            offset = self.slots.begin(slot, entry, at)
            slot.moving = True
            at += self.slots.arena.rounded(entry.slot_nbytes)
            self._moves.append(CopyMove(entry, slot.index, offset))
            self._emit(
                events.AdapterPlacing(
                    time=now, adapter=entry.label, version=entry.version, slot=slot.index, moved=True
                )
            )

    def placed(self, entry: AdapterEntry, now: float, seconds: float) -> bool:
        """Note that a copy is complete. Returns whether the adapter is new in the slot, and was not only
        moved."""
        assert entry.slot is not None
        entry.error = None
        slot = self.slots.slots[entry.slot]
        moved, last_used = slot.moving, slot.last_used
        self.slots.activate(slot, last_used if moved else now)
        entry.slot_seconds = seconds
        entry.last_used = entry.last_used if moved else now
        self._emit(
            events.AdapterPlaced(
                time=now,
                adapter=entry.label,
                version=entry.version,
                slot=entry.slot,
                rank=entry.rank,
                nbytes=entry.nbytes,
                seconds=seconds,
                moved=moved,
            )
        )
        return not moved

    def place_failed(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        assert entry.slot is not None
        self._cancel_copy(self.slots.slots[entry.slot], entry, now)
        entry.copy_failed = now
        self._failed(entry, now, error, "internal")

    def _cancel_copy(self, slot: Slot, entry: AdapterEntry, now: float) -> None:
        moved = slot.moving
        self.slots.cancel(slot)
        if moved:  # policy and listeners know it as an adapter in a slot
            self._emit(_evicted(entry, now, slot.index))
            self._tell("adapter_evicted", now, adapter=entry.name)

    def evict_slot(self, slot: Slot, now: float) -> None:
        entry = self.slots.release(slot)
        entry.last_used = max(entry.last_used, slot.last_used)
        self._emit(_evicted(entry, now, slot.index))
        self._tell("adapter_evicted", now, adapter=entry.name)

    # Common

    def take_moves(self) -> list[Move]:
        moves, self._moves = self._moves, []
        return moves

    def check(self) -> None:
        self.slots.check()
        self.cpu.check()
        loading = sum(e.location is Location.LOADING and not e.stalled for e in self.entries.values())
        assert loading == self._loads <= self._max_loads
        for name, entry in self.current.items():
            assert self.by_policy_name[name] is entry
        granule = self.slots.arena.granule
        for entry in self.entries.values():
            large = self.slots.places_of(entry.slot_nbytes) > 1
            assert (entry.uid in self.slots.large) == large and (entry.slot_nbytes > granule or not large)
            if entry.waiting or entry.running:
                assert self.by_policy_name[entry.name] is entry
            outside = entry.location is Location.DISK or entry.stalled
            assert outside == (entry.uid not in self.cpu.entries)
            assert entry.running == 0 or entry.location is Location.SLOT

    def is_known(self, entry: AdapterEntry) -> bool:
        """Whether the policy knows the entry; it does not know one that was never published."""
        return self.by_policy_name.get(entry.name) is entry

    def _evict_cpu(self, entry: AdapterEntry, now: float) -> None:
        entry.change(Change.DROP)
        self.cpu.remove(entry)
        self._moves.append(DropMove(entry))
        if self.is_known(entry):
            self._tell("adapter_dropped", now, adapter=entry.name)
        self._emit(_evicted(entry, now, None))

    def _failed(self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure) -> None:
        kept = entry.error = frameless(error)
        self._emit(
            events.AdapterFailed(
                time=now,
                adapter=entry.label,
                version=entry.version,
                reason=reason,
                error=kept,
            )
        )


def _evicted(entry: AdapterEntry, now: float, slot: int | None) -> events.AdapterEvicted:
    """Build the event of an eviction from a slot, or else from the CPU cache."""
    return events.AdapterEvicted(
        time=now,
        adapter=entry.label,
        version=entry.version,
        level="cpu" if slot is None else "slot",
        slot=slot,
        nbytes=entry.nbytes,
    )
