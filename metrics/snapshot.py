"""Gauges that are read from the engine at the moment of a scrape, so that they can never drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from aioengine.info import AdapterInfo, EngineStats, SlotStateName

SLOT_STATES = tuple(state.lower() for state in get_args(SlotStateName))


class SnapshotCollector(Collector):
    """Occupancy of slots, queues and KV cache. A scrape calls ``snapshot`` and ``adapters`` once.

    Slot and adapter series carry real adapter names: there are at most ``max_loras`` and
    ``max_cpu_loras`` of them at a time, however many adapters are registered.
    """

    def __init__(
        self,
        snapshot: Callable[[], EngineStats],
        adapters: Callable[[], list[AdapterInfo]],
        ranks: Mapping[tuple[str, int], int],
    ) -> None:
        self._snapshot = snapshot
        self._adapters = adapters
        self._ranks = ranks

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self._snapshot()
        yield from self._slots(stats)
        yield self._loaded()
        yield GaugeMetricFamily("aioengine_requests_running", "Requests in the batch.", value=stats.running)
        waiting = GaugeMetricFamily(
            "aioengine_requests_waiting",
            "Requests not running yet: their adapter is in no slot, or there is no room.",
            labels=["reason"],
        )
        waiting.add_metric(["adapter"], stats.waiting_for_adapter)
        waiting.add_metric(["capacity"], stats.waiting - stats.waiting_for_adapter)
        yield waiting
        used = stats.kv_blocks - stats.kv_blocks_free
        yield GaugeMetricFamily(
            "aioengine_kv_cache_usage_ratio",
            "KV blocks that running requests hold, as a share of all (0 to 1).",
            value=used / stats.kv_blocks if stats.kv_blocks else 0.0,
        )
        adapters = GaugeMetricFamily(
            "aioengine_lora_cpu_adapters",
            "Adapters in the CPU cache, those in slots and being read included.",
            value=stats.cpu_adapters,
        )
        yield adapters

    def _slots(self, stats: EngineStats) -> Iterator[GaugeMetricFamily]:
        states = GaugeMetricFamily(
            "aioengine_lora_slots",
            "Device slots by state; the states add up to max_loras.",
            labels=["state"],
        )
        count = dict.fromkeys(SLOT_STATES, 0)
        info = GaugeMetricFamily(
            "aioengine_lora_slot_info",
            "1 for the adapter that each slot holds.",
            labels=["slot", "adapter", "version", "rank"],
        )
        for slot in stats.slots:
            count[slot.state.lower()] += 1
            if slot.adapter is not None and slot.version is not None:
                rank = self._ranks.get((slot.adapter, slot.version), 0)
                info.add_metric([str(slot.index), slot.adapter, str(slot.version), str(rank)], 1)
        for state, number in count.items():
            states.add_metric([state], number)
        yield states
        yield info

    def _loaded(self) -> GaugeMetricFamily:
        loaded = GaugeMetricFamily(
            "aioengine_lora_adapter_loaded",
            "1 for each adapter in memory; level is the fastest place that holds it.",
            labels=["adapter", "level", "pinned"],
        )
        for info in self._adapters():
            if info.location in ("slot", "cpu"):
                pinned = "true" if info.pinned else "false"
                loaded.add_metric([info.name, info.location, pinned], 1)
        return loaded
