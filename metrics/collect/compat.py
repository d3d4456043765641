"""The series that request routers read, under the names that vLLM gave them.

Two protocols define them: the model server protocol of the Kubernetes Gateway API inference extension
(https://github.com/kubernetes-sigs/gateway-api-inference-extension, its proposal 003-model-server-protocol),
and llm-d's plugin metric protocol (https://github.com/llm-d/llm-d-router, docs/plugin-metric-protocol.md).

There is one ``vllm:lora_requests_info`` series, whose value is the time of the snapshot and whose labels are
lists separated by commas (an adapter's name cannot contain one). An adapter is in at most one of the two
lists, so that their lengths add up to the adapters that compete for the slots.
"""

from __future__ import annotations

from aioengine.info import AdapterInfo, EngineStats
from aioengine.metrics.collect.snapshot import in_memory, kv_usage
from aioengine.metrics.families.definitions import VLLM
from aioengine.metrics.families.storage import Family, Store, Value, gauge

_LEVELS = {"slot": "gpu", "cpu": "cpu"}
_TRANSITIONS = {"disk": "load", "slot": "activate"}


def vllm_families(
    engine: str, model: str, stats: EngineStats, adapters: list[AdapterInfo], now: float, store: Store
) -> list[Family]:
    """Return them. ``model`` is the base model's name in requests, ``now`` Unix time; ``store`` has the
    seconds of swaps."""
    ready = [slot.adapter for slot in stats.slots if slot.state == "READY" and slot.adapter is not None]
    waiting = [info.name for info in adapters if info.waiting and info.name not in set(ready)]
    loaded = in_memory(adapters)
    of_model: dict[str, float] = {
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
        "kv_cache_usage_perc": kv_usage(stats),
        "max_gpu_lora_adapters": len(stats.slots),
        "num_gpu_loaded_lora_adapters": sum(info.location == "slot" for info in loaded),
        "num_cpu_loaded_lora_adapters": len(loaded),
    }
    values: dict[str, Value] = {name: {(model,): value} for name, value in of_model.items()}
    values["lora_requests_info"] = {(str(len(stats.slots)), ",".join(ready), ",".join(waiting)): now}
    values["lora_adapter_loaded"] = {
        (model, info.name, _LEVELS[info.location], str(info.pinned).lower(), str(info.rank)): 1
        for info in loaded
    }
    seconds = Family(
        VLLM["vllm:lora_adapter_load_seconds"],
        [
            ((engine, model, transition), store.series("lora_swap_seconds", (stage,)).point())
            for stage, transition in _TRANSITIONS.items()
        ],
    )
    return [*(gauge(engine, f"vllm:{name}", value) for name, value in values.items()), seconds]
