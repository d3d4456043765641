"""Keeps running totals of events, and describes the present state of the engine and its adapters."""

from __future__ import annotations

from collections import Counter

from aioengine import events
from aioengine.core import Core
from aioengine.info import EngineStats, SlotInfo
from aioengine.schedulers.policy import Location


class Counters:
    """An event listener that counts; ``snapshot`` adds the core's state to the counts."""

    COUNTED = (events.RequestAdded, events.RequestAdmitted, events.RequestEnded, events.AdapterEvent)

    def __init__(self) -> None:
        self._counts = Counter[str]()
        """Fields of :class:`EngineStats`."""

    def __call__(self, event: events.Event) -> None:
        counts = self._counts
        match event:
            case events.RequestAdded():
                counts["prompt_tokens"] += event.prompt_tokens
                if event.adapter is not None:
                    counts["slot_hits" if event.location == "slot" else "slot_misses"] += 1
            case events.RequestAdmitted(resumed=False):
                counts["cached_tokens"] += event.cached_tokens
            case events.RequestEnded():
                kind = {"abort": "aborted", "error": "failed"}.get(event.reason, "finished")
                counts[f"requests_{kind}"] += 1
                counts["output_tokens"] += event.output_tokens
            case events.AdapterPlaced():
                counts["slot_loads"] += 1
            case events.AdapterLoaded():
                counts["cpu_loads"] += 1
            case events.AdapterEvicted():
                counts[f"{event.level}_evictions"] += 1
            case events.AdapterFailed():
                counts["load_failures"] += 1

    def snapshot(self, core: Core, listener_failures: int) -> EngineStats:
        queues, room, blocks, arena = core.queues, core.room, core.blocks, core.slots.arena
        # Those that have not run yet are too many to look at, and are counted in ``room``.
        begun = [*core.running.values()]
        if room.returned:
            begun += [request for request in queues if request.reservation is None]
        counts = self._counts.copy()
        counts["output_tokens"] += sum(request.made_tokens for request in begun)
        heads = [entry for entry in queues.heads.values() if entry is not None]
        cold = [entry for entry in heads if entry.location is not Location.SLOT]
        blocked = sum(len(entry.waiting) for entry in cold)
        if room.returned:  # preempted requests, whose places are gone
            blocked -= sum(request.reservation is None for entry in cold for request in entry.waiting)
        return EngineStats(
            **counts,
            slots=slot_infos(core),
            cpu_adapters=len(core.cpu.entries),
            cpu_capacity=core.cpu.capacity,
            adapters=len(core.residency.current),
            running=len(core.running),
            waiting=len(queues),
            waiting_for_adapter=blocked,
            waiting_preempted=room.returned,
            max_waiting=room.limits.max_waiting,
            waiting_tokens=room.tokens,
            max_waiting_tokens=room.limits.max_waiting_tokens,
            max_running=core.limits.max_num_seqs,
            kv_blocks=blocks.num_blocks,
            kv_blocks_free=blocks.num_free,
            block_size=blocks.block_size,
            uncomputed_tokens=room.tokens + sum(max(one.prompt_len - one.computed, 0) for one in begun),
            waiting_for={adapter or "": count for adapter, count in queues.by_adapter().items()},
            steps=core.step,
            preemptions=core.batcher.preemptions,
            listener_failures=listener_failures,
            slot_memory=arena.size,
            slot_memory_used=arena.size - arena.free,
            slot_memory_fragmented=0 if core.limits.slot_memory is None else arena.free - arena.largest_hole,
        )


def slot_infos(core: Core) -> tuple[SlotInfo, ...]:
    by_bytes = core.limits.slot_memory is not None
    regions = core.slots.arena.regions if by_bytes else {}
    return tuple(
        SlotInfo(
            index=slot.index,
            state=slot.state.value,
            adapter=None if slot.entry is None else slot.entry.label,
            version=None if slot.entry is None else slot.entry.version,
            running=0 if slot.entry is None else slot.entry.running,
            pinned=slot.entry is not None and slot.entry.pinned,
            offset=slot.offset if by_bytes else None,
            bytes=0 if slot.offset is None else regions.get(slot.offset, 0),
        )
        for slot in core.slots.slots
    )
