"""The series that request routers read, under the names that vLLM gave them.

Two protocols define them: the model server protocol of the Kubernetes Gateway API inference extension
(https://github.com/kubernetes-sigs/gateway-api-inference-extension, its proposal 003-model-server-protocol),
and llm-d's plugin metric protocol (https://github.com/llm-d/llm-d-router, docs/plugin-metric-protocol.md).

There is one ``vllm:lora_requests_info`` series, whose value is the time of the snapshot and whose labels are
lists separated by commas (an adapter's name cannot contain one). An adapter is in at most one of the two
lists, so that their lengths add up to the adapters that compete for the slots.
"""

from __future__ import annotations

from collections.abc import Iterator

from aioengine.info import AdapterInfo, EngineStats
from aioengine.metrics.collect.snapshot import gauge, kv_usage
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.storage import Family, Histograms

_LEVELS = {"slot": "gpu", "cpu": "cpu"}
_TRANSITIONS = {"disk": "load", "slot": "activate"}


def vllm_gauges(
    engine: str, model: str, stats: EngineStats, adapters: list[AdapterInfo], now: float
) -> Iterator[Family]:
    """Return the gauges. ``model`` is the base model's name in requests, ``now`` Unix time."""
    ready = [slot.adapter for slot in stats.slots if slot.state == "READY" and slot.adapter is not None]
    in_slot = set(ready)
    waiting = [info.name for info in adapters if info.waiting and info.name not in in_slot]
    lists = (str(len(stats.slots)), ",".join(ready), ",".join(waiting))
    loaded = [info for info in adapters if info.location in _LEVELS]
    yield gauge(engine, d.VLLM_RUNNING, ((model,), stats.running))
    yield gauge(engine, d.VLLM_WAITING, ((model,), stats.waiting))
    yield gauge(engine, d.VLLM_KV_CACHE_USAGE, ((model,), kv_usage(stats)))
    yield gauge(engine, d.VLLM_LORA_REQUESTS, (lists, now))
    yield gauge(engine, d.VLLM_LORA_LOADED, *(((model, *_residency(info)), 1.0) for info in loaded))
    yield gauge(engine, d.VLLM_MAX_GPU_LORA, ((model,), len(stats.slots)))
    yield gauge(engine, d.VLLM_GPU_LORA, ((model,), sum(info.location == "slot" for info in loaded)))
    yield gauge(engine, d.VLLM_CPU_LORA, ((model,), len(loaded)))


def vllm_load_seconds(engine: str, model: str, swap_seconds: Histograms) -> Family:
    """Return :data:`~aioengine.metrics.families.definitions.LORA_SWAP_SECONDS` under vLLM's name and
    transitions."""
    points = [
        ((engine, model, transition), swap_seconds.at((stage,)).point())
        for stage, transition in _TRANSITIONS.items()
    ]
    return Family(d.VLLM_LORA_LOAD_SECONDS, [*points])


def _residency(info: AdapterInfo) -> tuple[str, str, str, str]:
    return info.name, _LEVELS[info.location], "true" if info.pinned else "false", str(info.rank)
