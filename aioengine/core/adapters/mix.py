"""Mixes: weighted sums of adapters, or one with a scale, that are computed from the slots of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from operator import itemgetter

from aioengine.core.adapters.arena import rounded
from aioengine.core.adapters.cpu_cache import CpuCache
from aioengine.core.adapters.slots import SlotTable
from aioengine.core.state import AdapterEntry, AdapterFiles
from aioengine.errors import AdapterTooLarge, AioEngineError, EngineOverloaded
from aioengine.schedulers.policy import Location

_SLOWEST_FIRST = (Location.DISK, Location.LOADING, Location.CPU, Location.SLOT)


class MixEntry(AdapterEntry):
    """A mix as an adapter that requests wait for and run on. It has no slot and no memory of its own: it is
    where the slowest of its parts is, and runs when all of them are in slots.

    ``files`` has the sum as one adapter, for parts that cannot be added up in a step. Then that adapter,
    ``whole``, is the only part.
    """

    __slots__ = ("shown_at", "told", "whole")

    def __init__(
        self,
        uid: int,
        name: str,
        version: int,
        parts: Sequence[tuple[AdapterEntry, float]],
        files: AdapterFiles,
    ) -> None:
        self.whole: AdapterEntry | None = None
        self.shown_at: int | None = None
        """Index at which policies see it among the slots; None: it is not there."""
        self.told = Location.DISK
        """Where policies know it to be."""
        self.parts = tuple(parts)
        super().__init__(uid, name, version, "mix:" + name, files=files, parts=self.parts)

    @property
    def location(self) -> Location:
        found = {part.location for part, _ in self.parts}
        return next(location for location in _SLOWEST_FIRST if location in found)

    @location.setter
    def location(self, value: Location) -> None:
        """Do nothing, because its parts have their own."""

    @property
    def digest(self) -> str:
        """The digest of its content; "" while that of a part is not known."""
        digests = [part.digest for part, _ in self.parts]
        if not all(digests) or not self.slots:
            return "" if not all(digests) else digests[0]
        weights = [weight for _, weight in self.parts]
        return sha256(repr(list(zip(digests, weights, strict=True))).encode()).hexdigest()

    @digest.setter
    def digest(self, value: str) -> None:
        """Do nothing, as for ``location``."""

    @property
    def invocation(self) -> Sequence[int]:
        return self.whole.invocation if self.whole is not None else ()

    @invocation.setter
    def invocation(self, value: Sequence[int]) -> None:
        """Do nothing, as for ``location``."""

    @property
    def slots(self) -> Sequence[tuple[int, float]]:
        """What a step adds up; (): the only part as it is."""
        if len(self.parts) == 1 and self.parts[0][1] == 1.0:
            return ()
        return tuple((-1 if part.slot is None else part.slot, weight) for part, weight in self.parts)

    @property
    def missing(self) -> list[AdapterEntry]:
        """The parts that have no slot and are not on the way to one."""
        return [part for part in self.members if part.slot is None]

    @property
    def is_used(self) -> bool:
        return bool(self.running or self.waiting)


class Mixes:
    """The mixes that requests can use, and how policies see them: as slots behind the device's own.

    A mix that has requests, and all of whose parts have slots or are being copied there, is shown as one more
    slot. A policy that gives this slot away gives away that of one of the parts.
    """

    def __init__(self) -> None:
        self.by_uid: dict[int, MixEntry] = {}
        self.shown: list[MixEntry] = []
        self._lent: list[AdapterEntry] = []

    def add(self, mix: MixEntry) -> None:
        self.by_uid[mix.uid] = mix
        for part in mix.members:
            part.mixes[mix.uid] = mix

    def remove(self, mix: MixEntry) -> None:
        del self.by_uid[mix.uid]
        for part in mix.members:
            del part.mixes[mix.uid]

    def show(self, first: int) -> None:
        """Decide which are shown, from the index ``first`` on."""
        for mix in self.shown:
            mix.shown_at = None
        for part in self._lent:
            part.lent = False
        self.shown = [mix for mix in self.by_uid.values() if mix.is_used and not mix.missing]
        for index, mix in enumerate(self.shown, first):
            mix.shown_at = index
        self._lent = [part for mix in self.shown for part in mix.members]
        for part in self._lent:
            part.lent = True

    def waiting(self) -> list[MixEntry]:
        """Return those that requests wait for, in order of the oldest one."""
        found = [(mix.head.seq, mix) for mix in self.by_uid.values() if mix.head is not None]
        return [mix for _, mix in sorted(found, key=itemgetter(0))]

    def check(self) -> None:
        for mix in self.by_uid.values():
            assert mix.slot is None and mix.parts
            assert all(part.mixes[mix.uid] is mix for part in mix.members)
            assert not mix.running or mix.location is Location.SLOT


def shut_out(mix: MixEntry, slots: SlotTable, cpu: CpuCache) -> AioEngineError | None:
    """Return why a mix's parts can never be in slots, or in the CPU cache, at the same time; None if they
    can."""
    members, arena, why = mix.members, slots.arena, ""
    others = [
        slot.entry
        for slot in slots.slots
        if slot.entry is not None and slot.entry.pinned and slot.entry not in members
    ]
    if len(members) > (left := len(slots.slots) - len(others)):
        why = f"{len(members)} slots at a time, and there are {left}; raise LoRAConfig.max_loras"
    if arena is not None:
        left = arena.limit - sum(rounded(entry.slot_nbytes) for entry in others)
        if (size := sum(rounded(part.slot_nbytes) for part in members)) > left:
            why = f"{size:,} bytes of the slots' memory, and there are {left:,}; raise LoRAConfig.slot_memory"
    if cpu.max_bytes is not None:
        held = (entry for entry in cpu.entries.values() if entry.pinned and entry not in members)
        left = cpu.max_bytes - sum(entry.nbytes for entry in held)
        if (size := sum(part.nbytes for part in members)) > left:
            why = f"{size:,} bytes of CPU memory, and there are {left:,}; raise LoRAConfig.max_cpu_lora_bytes"
    if not why:
        return None
    text = f"the mix {mix.label!r} needs {why}"
    if others:
        return EngineOverloaded(f"{text}, or unpin one of {', '.join(entry.label for entry in others)}")
    return AdapterTooLarge(text, name=mix.label, path=mix.path)
