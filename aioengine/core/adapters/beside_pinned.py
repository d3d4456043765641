"""Which adapters and mixes have room beside the pinned adapters, and why others never will."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

from aioengine.core.adapters.arena import Arena, rounded
from aioengine.core.adapters.cpu_cache import CpuCache
from aioengine.core.adapters.mix import MixEntry
from aioengine.core.adapters.slots import SlotTable
from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterTooLarge, AioEngineError, EngineOverloaded


def adapters_shut_out(
    entries: Iterable[AdapterEntry | None], slots: SlotTable
) -> list[tuple[AdapterEntry, EngineOverloaded]]:
    """Return the adapters outside the slots that can never get one, or have room in the slots' memory, as
    long as the pinned adapters stay; and the reasons."""
    room = slots.room_beside_pinned()
    if room == inf:
        return []
    pinned = ", ".join(s.entry.label for s in slots.slots if s.entry is not None and s.entry.pinned)
    found: list[tuple[AdapterEntry, EngineOverloaded]] = []
    for entry in entries:
        if entry is None or entry.slot is not None or _may_get_in(entry, slots, room):
            continue
        where, setting = "every slot holds a pinned adapter", "max_loras"
        if room > 0:
            where = f"it takes {entry.slot_nbytes:,} bytes, and pinned adapters leave {room:,} bytes"
            where += "" if rounded(entry.slot_nbytes) > room else " in several pieces"
            setting = "slot_memory"
        text = f"adapter {entry.label!r} ({entry.path}) cannot get a slot, because {where} "
        text += f"({pinned}); unpin one, or raise LoRAConfig.{setting}"
        found.append((entry, EngineOverloaded(text, bound="pinned")))
    return found


def _may_get_in(entry: AdapterEntry, slots: SlotTable, room: float) -> bool:
    if rounded(entry.slot_nbytes) > room:
        return False
    return slots.arena is None or fit_beside_pinned([entry], slots, slots.arena)


def mixes_shut_out(
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
        error = _why_shut_out(mix, slots, cpu)
        if error is None:
            mix.fitted = key
        else:
            found.append((mix, error))
    return found


def _why_shut_out(mix: AdapterEntry, slots: SlotTable, cpu: CpuCache) -> AioEngineError | None:
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
        why = f"{size:,} bytes of the slots' memory, and there are {slots.arena.size:,}{beside}; raise "
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
        return EngineOverloaded(
            f"{text}, or unpin one of {', '.join(entry.label for entry in others)}", bound="pinned"
        )
    return AdapterTooLarge(text, name=mix.label, path=mix.path)


def _pinned(cpu: CpuCache) -> list[AdapterEntry]:
    return [entry for entry in cpu.entries.values() if entry.stays]


def fit_beside_pinned(entries: Sequence[AdapterEntry], slots: SlotTable, arena: Arena) -> bool:
    """Whether these adapters have room in the slots' memory together when nobody else is there but pinned
    adapters, which do not move."""
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
