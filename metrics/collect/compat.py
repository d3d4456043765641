"""The series that request routers read, under the names that vLLM gave them.

As the model server protocol of the Kubernetes Gateway API inference extension has it: one
``vllm:lora_requests_info`` series, whose value is the time of the snapshot and whose labels are lists
separated by commas (an adapter's name cannot contain one). An adapter is in at most one of the two
lists, so that their lengths add up to the adapters that compete for the slots.
"""

from __future__ import annotations

from collections.abc import Iterator

from aioengine.info import AdapterInfo, EngineStats
from aioengine.metrics.collect.snapshot import gauge, kv_usage, loaded
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.storage import Family


def vllm_gauges(engine: str, stats: EngineStats, adapters: list[AdapterInfo], now: float) -> Iterator[Family]:
    """``now`` is Unix time."""
    ready = [slot.adapter for slot in stats.slots if slot.state == "READY" and slot.adapter is not None]
    in_slot = set(ready)
    waiting = [info.name for info in adapters if info.waiting and info.name not in in_slot]
    lists = (str(len(stats.slots)), ",".join(ready), ",".join(waiting))
    yield gauge(engine, d.VLLM_RUNNING, ((), stats.running))
    yield gauge(engine, d.VLLM_WAITING, ((), stats.waiting))
    yield gauge(engine, d.VLLM_KV_CACHE_USAGE, ((), kv_usage(stats)))
    yield gauge(engine, d.VLLM_LORA_REQUESTS, (lists, now))
    yield gauge(engine, d.VLLM_LORA_LOADED, *loaded(adapters))
