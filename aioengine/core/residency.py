"""Where adapters are, and how they move: disk -> CPU cache -> slot, and back out.

This is bookkeeping only. It says which moves to start; the shell carries them out and reports back
through ``loaded``, ``load_failed``, ``placed`` and ``place_failed``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from aioengine import events
from aioengine.core.cpu_cache import CpuCache, Order, least_recently_used
from aioengine.core.failures import Failures
from aioengine.core.slots import Slot, SlotTable
from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterError
from aioengine.schedulers.policy import Location


class LoadMove(NamedTuple):
    """Read an adapter from disk into CPU memory."""

    entry: AdapterEntry


class CopyMove(NamedTuple):
    """Copy an adapter from CPU memory into a slot."""

    entry: AdapterEntry
    slot: int


class DropMove(NamedTuple):
    """Free an adapter's CPU memory."""

    entry: AdapterEntry


Move = LoadMove | CopyMove | DropMove


class Tell(Protocol):
    """Tells the policy of something that happened to the adapter that it knows by ``adapter``."""

    def __call__(self, kind: str, now: float, *, adapter: str, was: str | None = None) -> None: ...


class Residency:
    def __init__(
        self,
        *,
        num_slots: int,
        cpu_capacity: int,
        max_loads: int,
        emit: Callable[[events.Event], None],
        tell: Tell,
        cpu_max_bytes: int | None = None,
        cpu_order: Order = least_recently_used,
    ) -> None:
        self.slots = SlotTable(num_slots)
        self.cpu = CpuCache(cpu_capacity, cpu_max_bytes, cpu_order)
        self.failures = Failures()
        self.current: dict[str, AdapterEntry] = {}
        """Published entries by name: what new requests get."""
        self.by_policy_name: dict[str, AdapterEntry] = {}
        """Every entry that requests may be waiting or running on, superseded ones included."""
        self.entries: dict[int, AdapterEntry] = {}
        self._retired: dict[int, AdapterEntry] = {}
        self._wanted: dict[int, AdapterEntry] = {}
        self._last_version: dict[str, int] = {}
        self._next_uid = 0
        self._max_loads = max_loads
        self._loads = 0
        self._moves: list[Move] = []
        self._emit = emit
        self._tell = tell

    # Registration

    def declare(self, name: str, path: str) -> AdapterEntry:
        """A new version of ``name`` that nobody can ask for until it is published."""
        version = self._last_version.get(name, 0) + 1
        self._last_version[name] = version
        entry = AdapterEntry(self._next_uid, name, version, path)
        self._next_uid += 1
        self.entries[entry.uid] = entry
        return entry

    def publish(self, entry: AdapterEntry, now: float) -> None:
        """Give new requests this version; the one before it, if any, only finishes what it has."""
        old = self.current.get(entry.name)
        if old is not None:
            self.retire(old, now)
        self.current[entry.name] = entry
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

    def retire(self, entry: AdapterEntry, now: float) -> None:
        """Take no new requests on it; it is freed when those accepted have ended (see ``sweep``)."""
        entry.retired = True
        entry.pinned = False
        self.forget_want(entry)
        self._retired[entry.uid] = entry
        if self.current.get(entry.name) is entry:
            del self.current[entry.name]
            del self.by_policy_name[entry.name]
            entry.name = f"{entry.label}@{entry.version}"
            self.by_policy_name[entry.name] = entry
            self._tell("adapter_retired", now, adapter=entry.name, was=entry.label)

    def sweep(self, now: float) -> None:
        """Free every retired adapter that nothing uses any more."""
        for entry in list(self._retired.values()):
            moving = entry.location is Location.LOADING or self._copying(entry)
            if entry.waiting or entry.running or moving:
                continue
            if entry.slot is not None:
                self.evict_slot(self.slots.slots[entry.slot], now)
            if entry.location is Location.CPU:
                self._evict_cpu(entry, now)
            del self._retired[entry.uid]
            del self.entries[entry.uid]
            if self.is_known(entry):
                del self.by_policy_name[entry.name]
            self._emit(events.AdapterUnloaded(time=now, adapter=entry.label, version=entry.version))

    # Disk -> CPU

    @property
    def load_room(self) -> int:
        """Reads that may be started now."""
        return self._max_loads - self._loads

    def want(self, entry: AdapterEntry, now: float) -> None:
        """Bring it to the CPU cache as soon as there is room, though no request waits for it. If it is being
        read already it may be that there is no room when it arrives, and it has to be read again."""
        if entry.location is Location.DISK or entry.location is Location.LOADING:
            entry.wanted_since = now
            self._wanted[entry.uid] = entry

    def forget_want(self, entry: AdapterEntry) -> None:
        entry.wanted_since = None
        self._wanted.pop(entry.uid, None)

    def start_wanted(self, now: float, keep: set[int], *, waited: float = 0.0) -> None:
        """Begin the reads that were asked for at least ``waited`` seconds ago, as far as there is room."""
        for entry in list(self._wanted.values()):
            if entry.wanted_since is not None and now - entry.wanted_since >= waited:
                self.start_load(entry, now, keep)

    def start_load(self, entry: AdapterEntry, now: float, keep: set[int]) -> str | None:
        """Begin a read, making room if needed but not by taking an adapter (by uid) in ``keep`` out of
        its slot; returns why not, if not."""
        if entry.location is not Location.DISK:
            return "already_loaded"
        if entry.read_failed and entry.needed_since is None:
            return "failed_before"  # or a policy that reads ahead would have it tried without pause
        if self._loads >= self._max_loads:
            return "loads_at_limit"
        if not self.cpu.fits(entry) and not self._make_room(entry, now, keep):
            return "cpu_cache_full"
        self.cpu.add(entry)
        entry.location = Location.LOADING
        self._loads += 1
        self._moves.append(LoadMove(entry))
        self._emit(events.AdapterLoading(time=now, adapter=entry.label, version=entry.version))
        return None

    def _make_room(self, entry: AdapterEntry, now: float, keep: set[int]) -> bool:
        victims = self.cpu.victims(entry, now, keep)
        for victim in victims or ():
            if victim.slot is not None:
                self.evict_slot(self.slots.slots[victim.slot], now)
            self._evict_cpu(victim, now)
        return victims is not None

    def load_stalled(self, entry: AdapterEntry) -> None:
        """The read under way makes no progress. It goes on, and another may be started in its place."""
        assert entry.location is Location.LOADING and not entry.stalled
        entry.stalled = True
        self._loads -= 1
        self.cpu.remove(entry)

    def loaded(
        self, entry: AdapterEntry, now: float, *, rank: int, nbytes: int, digest: str, seconds: float
    ) -> None:
        """It has arrived; others leave if ``max_bytes`` would be exceeded. If not enough can leave now,
        it does so itself, and is read again when there is room for what is now known to be its size."""
        assert entry.location is Location.LOADING
        self.failures.forget(entry.label)
        entry.read_failed = False
        if entry.stalled:
            entry.stalled = False
            if not self.cpu.fits(entry) and not self._make_room(entry, now, set()):
                entry.location = Location.DISK
                self._moves.append(DropMove(entry))
                return
            self.cpu.add(entry)
        else:
            self._loads -= 1
        entry.location = Location.CPU
        entry.rank, entry.nbytes, entry.digest = rank, nbytes, digest
        entry.disk_seconds = seconds
        entry.last_used = now
        self._emit(
            events.AdapterLoaded(
                time=now,
                adapter=entry.label,
                version=entry.version,
                rank=rank,
                nbytes=nbytes,
                seconds=seconds,
            )
        )
        if self.cpu.resize(entry) or self._make_room(entry, now, set()):
            self.forget_want(entry)
            if self.is_known(entry):
                self._tell("adapter_loaded", now, adapter=entry.name)
        else:
            self._evict_cpu(entry, now)

    def load_failed(
        self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure
    ) -> None:
        self.load_cancelled(entry)
        self.forget_want(entry)
        entry.read_failed = True
        if isinstance(error, AdapterError) and len(entry.waiting):  # what is loaded by name is always read
            self.failures.add(entry.label, error, now)
        self._failed(entry, now, error, reason)

    def load_too_large(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        """It was read, and cannot be kept."""
        self.load_failed(entry, now, error, "too_large")
        self._moves.append(DropMove(entry))

    def load_cancelled(self, entry: AdapterEntry) -> None:
        """The read under way has ended without a result."""
        assert entry.location is Location.LOADING
        entry.location = Location.DISK
        if entry.stalled:
            entry.stalled = False
        else:
            self._loads -= 1
            self.cpu.remove(entry)

    def device_lost(self, now: float) -> None:
        """Everything that was read is gone from CPU and slots, and of the moves under way nothing more will
        be heard. What was asked for by name, and what is pinned, is read again."""
        for entry in self.entries.values():
            if entry.location is Location.LOADING:
                self.load_cancelled(entry)
                self._want_pinned(entry, now)
        for entry in list(self.cpu.entries.values()):
            if self._copying(entry) and entry.slot is not None:
                self.slots.cancel(self.slots.slots[entry.slot])
            elif entry.slot is not None:
                self.evict_slot(self.slots.slots[entry.slot], now)
            self._evict_cpu(entry, now)
            self._want_pinned(entry, now)
        self._moves.clear()

    def _want_pinned(self, entry: AdapterEntry, now: float) -> None:
        if entry.pinned and entry.wanted_since is None:
            self.want(entry, now)

    # CPU -> slot

    def choose_slot(self, keep: set[int]) -> Slot | None:
        """A free slot, else the least recently used idle one that is not pinned and whose adapter (by
        uid) is not in ``keep``; those that nobody waits for first."""
        free = self.slots.free_slot()
        if free is not None:
            return free
        idle = [
            s
            for s in self.slots.slots
            if s.idle and s.entry is not None and not s.entry.pinned and s.entry.uid not in keep
        ]
        return min(
            idle,
            key=lambda s: (s.entry is not None and len(s.entry.waiting) > 0, s.last_used),
            default=None,
        )

    def start_copy(self, entry: AdapterEntry, slot: Slot, now: float) -> None:
        """Begin a copy into a slot that is free or idle."""
        if slot.entry is not None:
            self.evict_slot(slot, now)
        self.slots.begin(slot, entry)
        self._moves.append(CopyMove(entry, slot.index))
        self._emit(
            events.AdapterPlacing(time=now, adapter=entry.label, version=entry.version, slot=slot.index)
        )

    def placed(self, entry: AdapterEntry, now: float, seconds: float) -> None:
        assert entry.slot is not None
        self.slots.activate(self.slots.slots[entry.slot], now)
        entry.slot_seconds = seconds
        entry.last_used = now
        self._emit(
            events.AdapterPlaced(
                time=now,
                adapter=entry.label,
                version=entry.version,
                slot=entry.slot,
                rank=entry.rank,
                nbytes=entry.nbytes,
                seconds=seconds,
            )
        )

    def place_failed(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        assert entry.slot is not None
        self.slots.cancel(self.slots.slots[entry.slot])
        entry.copy_failed = now
        self._failed(entry, now, error, "internal")

    def evict_slot(self, slot: Slot, now: float) -> None:
        entry = self.slots.release(slot)
        entry.last_used = max(entry.last_used, slot.last_used)
        self._emit(
            events.AdapterEvicted(
                time=now,
                adapter=entry.label,
                version=entry.version,
                level="slot",
                slot=slot.index,
                nbytes=entry.nbytes,
            )
        )
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
        for entry in self.entries.values():
            if entry.waiting or entry.running:
                assert self.by_policy_name[entry.name] is entry
            outside = entry.location is Location.DISK or entry.stalled
            assert outside == (entry.uid not in self.cpu.entries)
            assert entry.running == 0 or entry.location is Location.SLOT

    def is_known(self, entry: AdapterEntry) -> bool:
        """Whether the policy knows of it: not so if it was never published."""
        return self.by_policy_name.get(entry.name) is entry

    def _copying(self, entry: AdapterEntry) -> bool:
        return entry.slot is not None and self.slots.slots[entry.slot].loading

    def _evict_cpu(self, entry: AdapterEntry, now: float) -> None:
        assert entry.location is Location.CPU and entry.slot is None
        self.cpu.remove(entry)
        entry.location = Location.DISK
        self._moves.append(DropMove(entry))
        if self.is_known(entry):
            self._tell("adapter_dropped", now, adapter=entry.name)
        self._emit(
            events.AdapterEvicted(
                time=now,
                adapter=entry.label,
                version=entry.version,
                level="cpu",
                slot=None,
                nbytes=entry.nbytes,
            )
        )

    def _failed(self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure) -> None:
        self._emit(
            events.AdapterFailed(
                time=now,
                adapter=entry.label,
                version=entry.version,
                reason=reason,
                error=error,
            )
        )
