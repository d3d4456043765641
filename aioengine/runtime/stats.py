"""Keeps running totals of events, and describes the present state of the engine and its adapters."""

from __future__ import annotations

from collections import Counter

from aioengine import events
from aioengine.core import Core
from aioengine.core.state import AdapterEntry, location_name
from aioengine.info import AdapterInfo, EngineLoad, EngineStats, SlotInfo
from aioengine.schedulers.policy import Location


class Counters:
    """An event listener that counts; ``snapshot`` adds the core's state to the counts."""

    COUNTED = (
        events.RequestAdded,
        events.RequestAdmitted,
        events.RequestEnded,
        events.AdapterEvent,
        events.EngineRestarted,
    )

    def __init__(self) -> None:
        self._n: Counter[str] = Counter()
        self.residency = 0
        """Number of changes to the contents of slots and CPU cache, and of replacements."""
        self.memory_unplanned: int | None = None
        """Value of the field of :class:`EngineStats`."""

    def __call__(self, event: events.Event) -> None:
        n = self._n
        match event:
            case events.RequestAdded(adapter=str()):
                n["slot_hits" if event.location == "slot" else "slot_misses"] += 1
            case events.RequestAdmitted(resumed=False):
                n["cached_tokens"] += event.cached_tokens
            case events.RequestEnded():
                kind = {"abort": "aborted", "error": "failed"}.get(event.reason, "finished")
                n[f"requests_{kind}"] += 1
                n["prompt_tokens"] += event.prompt_tokens
                n["output_tokens"] += event.output_tokens
            case events.AdapterPlaced():
                n["slot_loads"] += 1
                self.residency += 1
            case events.AdapterLoaded():
                n["cpu_loads"] += 1
                self.residency += 1
            case events.AdapterEvicted():
                n[f"{event.level}_evictions"] += 1
                self.residency += 1
            case (
                events.AdapterUnloaded() | events.EngineRestarted() | events.AdapterRegistered(replaces=int())
            ):
                self.residency += 1
            case events.AdapterFailed():
                n["load_failures"] += 1

    def snapshot(self, core: Core, listener_failures: int) -> EngineStats:
        n = self._n
        queues = core.queues
        preempted = core.room.returned
        blocked = sum(
            len(entry.waiting) - (sum(r.ticket is None for r in entry.waiting) if preempted else 0)
            for entry in queues.heads.values()
            if entry is not None and entry.location is not Location.SLOT
        )
        live = core.requests.values()
        return EngineStats(
            slots=slot_infos(core),
            cpu_adapters=len(core.cpu.entries),
            cpu_capacity=core.cpu.capacity,
            adapters=len(core.residency.current),
            running=len(core.running),
            waiting=len(queues),
            waiting_for_adapter=blocked,
            waiting_preempted=preempted,
            max_waiting=core.room.max_waiting,
            waiting_tokens=core.room.tokens,
            max_waiting_tokens=core.room.max_tokens,
            max_running=core.limits.max_num_seqs,
            kv_blocks=core.blocks.num_blocks,
            kv_blocks_free=core.blocks.num_free,
            kv_blocks_pinned=len(core.blocks.pins),
            kv_pins_lost=core.blocks.pins_lost,
            block_size=core.blocks.block_size,
            steps=core.step,
            preemptions=core.batcher.preemptions,
            requests_finished=n["requests_finished"],
            requests_aborted=n["requests_aborted"],
            requests_failed=n["requests_failed"],
            prompt_tokens=n["prompt_tokens"] + sum(r.prompt_len for r in live),
            cached_tokens=n["cached_tokens"],
            output_tokens=n["output_tokens"] + sum(r.made_tokens for r in live),
            slot_loads=n["slot_loads"],
            slot_evictions=n["slot_evictions"],
            cpu_loads=n["cpu_loads"],
            cpu_evictions=n["cpu_evictions"],
            load_failures=n["load_failures"],
            listener_failures=listener_failures,
            slot_hits=n["slot_hits"],
            **_slot_memory(core),
            memory_unplanned=self.memory_unplanned,
            slot_misses=n["slot_misses"],
        )


def _slot_memory(core: Core) -> dict[str, int]:
    arena, by_bytes = core.slots.arena, core.limits.slot_memory is not None
    return {
        "slot_memory": arena.size,
        "slot_memory_used": arena.used,
        "slot_memory_fragmented": arena.free - arena.largest_hole if by_bytes else 0,
    }


def slot_infos(core: Core) -> tuple[SlotInfo, ...]:
    arena, by_bytes = core.slots.arena, core.limits.slot_memory is not None
    return tuple(
        SlotInfo(
            index=slot.index,
            state=slot.state.value,
            adapter=None if slot.entry is None else slot.entry.label,
            version=None if slot.entry is None else slot.entry.version,
            running=0 if slot.entry is None else slot.entry.running,
            pinned=slot.entry is not None and slot.entry.pinned,
            offset=slot.offset if by_bytes else None,
            bytes=arena.regions[slot.offset] if by_bytes and slot.offset is not None else 0,
        )
        for slot in core.slots.slots
    )


def engine_load(core: Core, step_age: float) -> EngineLoad:
    live = core.requests.values()
    block = core.blocks.block_size
    return EngineLoad(
        running=len(core.running),
        waiting=len(core.queues),
        waiting_tokens=sum(max(r.prompt_len - r.computed, 0) for r in live),
        running_tokens=sum(r.computed for r in core.running.values()),
        kv_tokens=core.blocks.num_blocks * block,
        kv_tokens_free=core.blocks.num_free * block,
        waiting_for=core.queues.by_adapter(),
        step_age=step_age,
    )


def adapter_info(entry: AdapterEntry) -> AdapterInfo:
    return AdapterInfo(
        name=entry.label,
        version=entry.version,
        path=entry.path,
        rank=entry.rank,
        bytes=entry.nbytes,
        digest=entry.digest,
        labels=entry.labels,
        location=location_name(entry),
        slot=entry.slot if entry.location is Location.SLOT else None,
        pinned=entry.pinned,
        running=entry.running,
        waiting=len(entry.waiting),
    )
