"""Mixes: weighted sums of adapters, or one with a scale, that are computed from the slots of their parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

from aioengine.core.adapters.arena import Arena, rounded
from aioengine.core.adapters.cpu_cache import CpuCache
from aioengine.core.adapters.slots import SlotTable
from aioengine.core.state import AdapterEntry, AdapterFiles
from aioengine.errors import AdapterTooLarge, AioEngineError, EngineOverloaded
from aioengine.schedulers.policy import Location

_SLOWEST_FIRST = (Location.DISK, Location.LOADING, Location.CPU, Location.SLOT)


class MixEntry(AdapterEntry):
    """A mix, which requests wait for and run on. It has no slot and no memory of its own: it is where the
    slowest of its parts is, and runs when all of them are in slots.

    Policies do not see it. A request for one scaled adapter waits among the requests for that adapter;
    ``waiting`` has the requests for a mix of several.
    """

    __slots__ = ("_digest", "_digested", "_members", "fitted", "uses")

    def __init__(
        self,
        uid: int,
        name: str,
        version: int,
        parts: Sequence[tuple[AdapterEntry, float]],
        files: AdapterFiles,
    ) -> None:
        self.parts = tuple(parts)
        self._members = tuple(part for part, _ in parts)
        self.uses = 0
        """Number of requests for it that have not ended."""
        self.fitted: object = None
        """Pinned adapters and sizes with which its parts were found to fit; see :func:`shut_out`."""
        self._digested: list[str] | None = None
        """The parts' digests that ``_digest`` was made of."""
        self._digest = ""
        super().__init__(uid, name, version, "mix:" + name, files=files, parts=self.parts)

    @property
    def members(self) -> Sequence[AdapterEntry]:
        return self._members

    @property
    def location(self) -> Location:
        found = {part.location for part, _ in self.parts}
        return next(location for location in _SLOWEST_FIRST if location in found)

    @location.setter
    def location(self, value: Location) -> None:
        """Do nothing, because its parts have their own."""

    @property
    def rank(self) -> int:
        return sum(part.rank for part, _ in self.parts)

    @rank.setter
    def rank(self, value: int) -> None:
        """Do nothing, as for ``location``."""

    @property
    def digest(self) -> str:
        """The digest of its content; "" while that of a part is not known."""
        digests = [part.digest for part, _ in self.parts]
        if digests != self._digested:  # each output has it
            self._digested, self._digest = digests, ""
            if all(digests):
                weights = [weight for _, weight in self.parts]
                content = repr(list(zip(digests, weights, strict=True)))
                self._digest = sha256(content.encode()).hexdigest()
        return self._digest

    @digest.setter
    def digest(self, value: str) -> None:
        """Do nothing, as for ``location``."""

    @property
    def home(self) -> AdapterEntry:
        return self.parts[0][0] if len(self.parts) == 1 else self

    @property
    def slots(self) -> Sequence[tuple[int, float]]:
        return tuple((-1 if part.slot is None else part.slot, weight) for part, weight in self.parts)


def all_shut_out(
    mixes: Iterable[AdapterEntry], slots: SlotTable, cpu: CpuCache
) -> list[tuple[AdapterEntry, AioEngineError]]:
    """Return the mixes whose parts can never be in slots, or in the CPU cache, at the same time, as long as
    the pinned adapters stay; and the reasons. Each is looked at again when these or its sizes change. A mix
    that waits for a read which stalls is not looked at: more adapters may stay until that has ended."""
    found: list[tuple[AdapterEntry, AioEngineError]] = []
    pinned = [(s.index, s.offset) for s in slots.slots if s.entry is not None and s.entry.stays]
    stay = pinned, [entry.uid for entry in _pinned(cpu)]
    for mix in mixes:
        assert isinstance(mix, MixEntry)
        key = stay, [(part.slot_nbytes, part.nbytes) for part in mix.members]
        if mix.fitted == key or mix.stalls:
            continue
        error = shut_out(mix, slots, cpu)
        if error is None:
            mix.fitted = key
        else:
            found.append((mix, error))
    return found


def shut_out(mix: AdapterEntry, slots: SlotTable, cpu: CpuCache) -> AioEngineError | None:
    """Return why a mix's parts can never be in slots, or in the CPU cache, at the same time, as long as the
    pinned adapters stay; None if they can."""
    members, why = mix.members, ""
    held = [s.entry for s in slots.slots if s.entry is not None and s.entry.stays]
    others = [entry for entry in held if entry not in members]
    if len(members) > (left := len(slots.slots) - len(others)):
        why = f"{len(members)} slots at a time, and there are {left}; raise LoRAConfig.max_loras"
    elif slots.arena is not None and not fit_beside_pinned(members, slots, slots.arena):
        size = sum(rounded(part.slot_nbytes) for part in members)
        beside = ", which pinned adapters lie between" if others else ""
        why = f"{size:,} bytes of the slots' memory, and there are {slots.arena.limit:,}{beside}; raise "
        why += "LoRAConfig.slot_memory"
    elif len(members) > (left := cpu.capacity - sum(1 for e in _pinned(cpu) if e not in members)):
        why = f"{len(members)} places in the CPU cache, and there are {left}; raise LoRAConfig.max_cpu_loras"
    elif cpu.max_bytes is not None:
        left = cpu.max_bytes - sum(entry.nbytes for entry in _pinned(cpu) if entry not in members)
        if (size := sum(part.nbytes for part in members)) > left:
            why = f"{size:,} bytes of CPU memory, and there are {left:,}; raise LoRAConfig.max_cpu_lora_bytes"
    if not why:
        return None
    others += [entry for entry in _pinned(cpu) if entry not in members and entry not in others]
    text = f"the mix {mix.label!r} needs {why}"
    if others:
        return EngineOverloaded(f"{text}, or unpin one of {', '.join(entry.label for entry in others)}")
    return AdapterTooLarge(text, name=mix.label, path=mix.path)


def _pinned(cpu: CpuCache) -> list[AdapterEntry]:
    return [entry for entry in cpu.entries.values() if entry.stays]


def fit_beside_pinned(entries: Sequence[AdapterEntry], slots: SlotTable, arena: Arena) -> bool:
    """Whether these adapters have room in the slots' memory together when nobody else is there but pinned
    adapters, which do not move."""
    if arena.limit != arena.size or not arena.size:  # shared with KV blocks: there all are moved together
        held = (s.entry for s in slots.slots if s.entry is not None and s.entry.stays)
        everyone = {entry.uid: entry for entry in (*entries, *held)}.values()
        return sum(rounded(entry.slot_nbytes) for entry in everyone) <= arena.limit
    left = [
        s.offset for s in slots.slots if s.entry is not None and not s.entry.stays and s.offset is not None
    ]
    outside = [entry for entry in entries if not (entry.stays and entry.slot is not None)]
    return fits(arena, left, outside) is not None


def fits(arena: Arena, leaving: Sequence[int], entries: Sequence[AdapterEntry]) -> list[AdapterEntry] | None:
    """Return the order in which the adapters find room, each in the smallest hole that it fits in, once the
    regions ``leaving`` are free; None if they do not. The largest come first."""
    trial = arena.copy()
    for offset in leaving:
        trial.release(offset)
    in_order = sorted(entries, key=lambda entry: (-entry.slot_nbytes, entry.uid))
    if all(trial.allocate(entry.slot_nbytes) is not None for entry in in_order):
        return in_order
    return None
