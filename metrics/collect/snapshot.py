"""Gauges that are read from the engine at each scrape, so that they are always right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import get_args

from aioengine.info import AdapterInfo, EngineStats, SlotStateName
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.storage import Family, HistogramPoint, Labels

STATES = ("starting", "ready", "draining", "degraded", "dead")
_SHOWN = {"running": "ready", "stopping": "draining"}
SLOT_STATES = tuple(state.lower() for state in get_args(SlotStateName))


def gauges(
    engine: str, stats: EngineStats, adapters: list[AdapterInfo], rank: Callable[[str, int], int]
) -> Iterator[Family]:
    """Return the occupancy of slots, CPU cache, queues and KV cache. ``rank`` is that of a version.

    Slot and adapter series carry real adapter names: there are at most ``max_loras`` and
    ``max_cpu_loras`` of them at a time, however many adapters are registered.
    """
    count = dict.fromkeys(SLOT_STATES, 0)
    held: list[tuple[Labels, float]] = []
    for slot in stats.slots:
        count[slot.state.lower()] += 1
        if slot.adapter is not None and slot.version is not None:
            number = str(rank(slot.adapter, slot.version))
            held.append(((str(slot.index), slot.adapter, str(slot.version), number), 1.0))
    yield gauge(engine, d.LORA_SLOTS, *(((state,), number) for state, number in count.items()))
    yield gauge(engine, d.LORA_SLOT_INFO, *held)
    yield gauge(engine, d.LORA_ADAPTER_LOADED, *loaded(adapters))
    held_bytes = ((info.name, info.location, info.bytes) for info in adapters)
    inside = (((name, level), size) for name, level, size in held_bytes if level in ("slot", "cpu"))
    yield gauge(engine, d.LORA_ADAPTER_BYTES, *inside)
    free = stats.slot_memory - stats.slot_memory_used
    yield gauge(
        engine,
        d.LORA_SLOT_BYTES,
        (("used",), stats.slot_memory_used),
        (("free",), free - stats.slot_memory_fragmented),
        (("fragmented",), stats.slot_memory_fragmented),
    )
    yield gauge(engine, d.LORA_ADAPTERS, ((), stats.adapters))
    yield gauge(engine, d.LORA_CPU_ADAPTERS, ((), stats.cpu_adapters))
    yield gauge(engine, d.REQUESTS_RUNNING, ((), stats.running))
    yield gauge(
        engine,
        d.REQUESTS_WAITING,
        (("adapter",), stats.waiting_for_adapter),
        (("capacity",), stats.waiting - stats.waiting_for_adapter - stats.waiting_preempted),
        (("preempted",), stats.waiting_preempted),
    )
    yield gauge(engine, d.KV_CACHE_USAGE, ((), kv_usage(stats)))
    yield gauge(engine, d.KV_CACHE_BLOCKS, ((), stats.kv_blocks))
    unplanned = stats.memory_unplanned
    yield gauge(engine, d.MEMORY_UNPLANNED, *([] if unplanned is None else [((), unplanned)]))
    yield gauge(engine, d.KV_BLOCKS_PINNED, ((), stats.kv_blocks_pinned))
    yield gauge(engine, d.REQUESTS_RUNNING_LIMIT, ((), stats.max_running))
    yield gauge(engine, d.REQUESTS_WAITING_LIMIT, ((), _bound(stats.max_waiting)))
    yield gauge(engine, d.WAITING_TOKENS, ((), stats.waiting_tokens))
    yield gauge(engine, d.WAITING_TOKENS_LIMIT, ((), _bound(stats.max_waiting_tokens)))
    yield gauge(engine, d.LORA_CPU_ADAPTERS_LIMIT, ((), stats.cpu_capacity))


def _bound(most: int | None) -> float:
    return math.inf if most is None else most


def engine_state(engine: str, now: str) -> Family:
    """Return the gauge of the state. ``now`` is an :data:`~aioengine.engine.EngineState`; a stopped engine
    has no state."""
    shown = _SHOWN.get(now, now)
    return gauge(engine, d.ENGINE_STATE, *(((name,), float(name == shown)) for name in STATES))


def loaded(adapters: list[AdapterInfo]) -> Iterator[tuple[Labels, float]]:
    for info in adapters:
        if info.location in ("slot", "cpu"):
            yield (info.name, info.location, "true" if info.pinned else "false"), 1.0


def kv_usage(stats: EngineStats) -> float:
    used = stats.kv_blocks - stats.kv_blocks_free
    return used / stats.kv_blocks if stats.kv_blocks else 0.0


def gauge(engine: str, definition: d.Definition, *values: tuple[Labels, float]) -> Family:
    points: list[tuple[Labels, float | HistogramPoint]] = [
        ((engine, *labels), float(value)) for labels, value in values
    ]
    return Family(definition, points)
