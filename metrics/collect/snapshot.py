"""Gauges that are read from the engine and its process at each scrape, so that they are always right."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import get_args

import psutil
from prometheus_client import ProcessCollector

from aioengine.info import AdapterInfo, EngineStats, SlotStateName
from aioengine.metrics.families.definitions import PROCESS
from aioengine.metrics.families.storage import Family, Value, gauge

STATES = ("starting", "ready", "draining", "degraded", "dead")
_SHOWN = {"running": "ready", "stopping": "draining"}
SLOT_STATES = [state.lower() for state in get_args(SlotStateName)]


def engine_gauges(
    stats: EngineStats, adapters: list[AdapterInfo], rank: Callable[[str, int], int]
) -> dict[str, Value]:
    """Return the occupancy of slots, CPU cache, queues and KV cache. ``rank`` is that of a version.

    Slot and adapter series carry real adapter names: there are at most ``max_loras`` and
    ``max_cpu_loras`` of them at a time, however many adapters are registered.
    """
    states = Counter(slot.state.lower() for slot in stats.slots)
    held = [(s.index, s.adapter, s.version) for s in stats.slots if s.adapter and s.version is not None]
    inside = in_memory(adapters)
    free = stats.slot_memory - stats.slot_memory_used
    capacity = stats.waiting - stats.waiting_for_adapter - stats.waiting_preempted
    return {
        "lora_slots": {(state,): states[state] for state in SLOT_STATES},
        "lora_slot_info": {
            (str(index), name, str(version), str(rank(name, version))): 1 for index, name, version in held
        },
        "lora_adapter_loaded": {(info.name, info.location, str(info.pinned).lower()): 1 for info in inside},
        "lora_adapter_bytes": {(info.name, info.location): info.bytes for info in inside},
        "lora_slot_bytes": {
            ("used",): stats.slot_memory_used,
            ("free",): free - stats.slot_memory_fragmented,
            ("fragmented",): stats.slot_memory_fragmented,
        },
        "lora_adapters": stats.adapters,
        "lora_cpu_adapters": stats.cpu_adapters,
        "lora_cpu_adapters_limit": stats.cpu_capacity,
        "requests_running": stats.running,
        "requests_running_limit": stats.max_running,
        "requests_waiting": {
            ("adapter",): stats.waiting_for_adapter,
            ("capacity",): capacity,
            ("preempted",): stats.waiting_preempted,
        },
        "requests_waiting_limit": math.inf if stats.max_waiting is None else stats.max_waiting,
        "waiting_tokens": stats.waiting_tokens,
        "waiting_tokens_limit": math.inf if stats.max_waiting_tokens is None else stats.max_waiting_tokens,
        "kv_cache_usage_ratio": kv_usage(stats),
        "kv_cache_blocks": stats.kv_blocks,
    }


def engine_state(engine: str, now: str) -> Family:
    """Return the gauge of the state. ``now`` is an :data:`~aioengine.info.EngineState`; a stopped engine has
    no state."""
    return gauge(engine, "engine_state", {(name,): name == _SHOWN.get(now, now) for name in STATES})


def in_memory(adapters: Iterable[AdapterInfo]) -> list[AdapterInfo]:
    """Return the adapters that a slot or the CPU cache holds."""
    return [info for info in adapters if info.location in ("slot", "cpu")]


def kv_usage(stats: EngineStats) -> float:
    used = stats.kv_blocks - stats.kv_blocks_free
    return used / stats.kv_blocks if stats.kv_blocks else 0.0


class ProcessMetrics:
    """Metrics of the process, from ``prometheus_client`` and psutil. Those that need ``/proc`` are exported
    only where it exists."""

    def __init__(self) -> None:
        self._collector = ProcessCollector(registry=None)
        self._process = psutil.Process()

    def families(self, engine: str) -> list[Family]:
        values: dict[str, Value] = {
            metric.name: metric.samples[0].value
            for metric in self._collector.collect()
            if metric.name in PROCESS and metric.samples
        }
        values["process_threads"] = self._process.num_threads()
        try:
            values["event_loop_tasks"] = len(asyncio.all_tasks())
        except RuntimeError:  # the loop has ended
            values["event_loop_tasks"] = 0
        return [gauge(engine, name, value) for name, value in values.items()]
