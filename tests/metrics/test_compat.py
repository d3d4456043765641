"""The series for request routers: what two routers' published scorers make of a scrape's text.

The arithmetic is that of the documentation: of the Gateway API inference extension's endpoint picker
(https://github.com/kubernetes-sigs/gateway-api-inference-extension: lora-affinity-scorer, queue-scorer,
kv-cache-utilization-scorer), and of llm-d's (https://github.com/llm-d/llm-d-router,
docs/plugin-metric-protocol.md, and the scorer loraloadstate's README: lora-load-state-scorer).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.metric_script import families, info, loaded, metrics, placed, slot, stats

from aioengine import AdapterInfo
from aioengine.metrics import EngineMetrics


@dataclass
class Endpoint:
    """What an endpoint picker keeps of one scrape."""

    active: list[str]
    waiting: list[str]
    max_active: int
    queue: float
    running: float
    kv: float
    base: str
    resident: dict[str, tuple[str, bool, int]] = field(default_factory=dict)
    """Adapter -> level, pinned, rank."""
    on_gpu: int = 0
    load_seconds: float = 0.0
    activate_seconds: float = 0.0


def endpoint(text: str) -> Endpoint:
    found: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}

    def one(name: str) -> float:
        [sample] = found[name].samples
        assert sample.labels["model_name"]
        return sample.value

    def mean(transition: str) -> float:
        values = {
            sample.name.removeprefix("vllm:lora_adapter_load_seconds_"): sample.value
            for sample in found["vllm:lora_adapter_load_seconds"].samples
            if sample.labels["transition"] == transition
        }
        return values["sum"] / values["count"] if values["count"] else 0.0

    newest = max(found["vllm:lora_requests_info"].samples, key=lambda sample: sample.value)
    lists = [
        [name.strip() for name in newest.labels[key].split(",") if name.strip()]
        for key in ("running_lora_adapters", "waiting_lora_adapters")
    ]
    return Endpoint(
        active=lists[0],
        waiting=lists[1],
        max_active=int(one("vllm:max_gpu_lora_adapters")),
        queue=one("vllm:num_requests_waiting"),
        running=one("vllm:num_requests_running"),
        kv=one("vllm:kv_cache_usage_perc"),
        base=found["vllm:num_gpu_loaded_lora_adapters"].samples[0].labels["model_name"],
        resident={
            sample.labels["adapter_name"]: (
                sample.labels["level"],
                sample.labels["pinned"] == "true",
                int(sample.labels["rank"]),
            )
            for sample in found["vllm:lora_adapter_loaded"].samples
            if sample.value
        },
        on_gpu=int(one("vllm:num_gpu_loaded_lora_adapters")),
        load_seconds=mean("load"),
        activate_seconds=mean("activate"),
    )


def lora_affinity(at: Endpoint, adapter: str) -> float:
    """Active: 1.0; room for one more: 0.8; already waiting: 0.6; else 0."""
    if adapter in at.active:
        return 1.0
    if len(at.active) + len(at.waiting) < at.max_active:
        return 0.8
    return 0.6 if adapter in at.waiting else 0.0


def queue_scores(all_: list[Endpoint]) -> list[float]:
    """Linear from the longest queue, 0, to the shortest, 1; 1 for all if they are equal."""
    sizes = [at.queue for at in all_]
    span = max(sizes) - min(sizes)
    return [(max(sizes) - size) / span if span else 1.0 for size in sizes]


def load_state(at: Endpoint, adapter: str) -> float:
    """The tiers, without the bonuses that order endpoints within one."""
    level = at.resident.get(adapter, ("", False, 0))[0]
    if level:
        return {"gpu": 1.0, "cpu": 0.7}[level]
    if at.on_gpu < at.max_active:
        return 0.6
    idle = [
        name
        for name, (where, pinned, _) in at.resident.items()
        if where == "gpu" and not pinned and name not in at.active
    ]
    return 0.3 if idle else 0.0


def priced_load_state(at: Endpoint, adapter: str, horizon: float) -> float:
    """With ``loadHorizonSeconds``: 1 - t / horizon, where t is what it takes to make the adapter servable."""
    level = at.resident.get(adapter, ("", False, 0))[0]
    if level == "gpu":
        return 1.0
    seconds = at.activate_seconds + (0.0 if level == "cpu" else at.load_seconds)
    return max(0.0, 1 - seconds / horizon)


def waiting(name: str, location: str) -> AdapterInfo:
    known = info(name, location)
    fields = {field: getattr(known, field) for field in AdapterInfo.__struct_fields__}
    return AdapterInfo(**{**fields, "waiting": 3})


STATS = {"running": 5, "waiting": 7, "waiting_for_adapter": 4, "kv_blocks": 10, "kv_blocks_free": 4}


def made(clock: float = 1234.5, **values: int) -> EngineMetrics:
    snapshot = stats(
        slot(0, "READY", "sql", 1),
        slot(1, "READY", "json/v2", 1),
        slot(2, "LOADING", "pirate", 1),
        slot(3, "DRAINING", "old", 1),
        **{**STATS, **values},
    )
    adapters = [waiting("sql", "slot"), info("json/v2", "slot", pinned=True), waiting("pirate", "cpu")]
    adapters += [waiting("far", "disk"), info("idle", "disk")]
    engine = EngineMetrics(
        10,
        lambda: snapshot,
        lambda: adapters,
        compat="vllm",
        clock=lambda: clock,
        model_name=lambda: "org/base",
    )
    for event in (
        loaded("sql", seconds=0.2),
        loaded("json/v2", seconds=0.4),
        placed("sql", 0, seconds=0.01),
        placed("json/v2", 1, seconds=0.03),
    ):
        engine.handle(event)
    return engine


def scraped(engine: EngineMetrics) -> Endpoint:
    return endpoint(engine.expose()[0].decode())


def test_the_router_sees_what_is_in_the_slots() -> None:
    found = scraped(made())
    assert (found.active, found.waiting) == (["sql", "json/v2"], ["pirate", "far"])
    assert (found.max_active, found.queue, found.running, found.kv) == (4, 7, 5, 0.6)
    assert found.base == "org/base"
    assert found.resident == {
        "sql": ("gpu", False, 8),
        "json/v2": ("gpu", True, 8),
        "pirate": ("cpu", False, 8),
    }
    assert found.on_gpu == 2
    assert (found.load_seconds, found.activate_seconds) == (pytest.approx(0.3), pytest.approx(0.02))


def test_the_labels_are_those_of_vllm() -> None:
    labels = {
        sample.name: {key for key in sample.labels if key != "engine"}
        for family in text_string_to_metric_families(made().expose()[0].decode())
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }
    assert labels.pop("vllm:lora_requests_info") == {
        "max_lora",
        "running_lora_adapters",
        "waiting_lora_adapters",
    }
    assert labels.pop("vllm:lora_adapter_loaded") == {
        "model_name",
        "adapter_name",
        "level",
        "pinned",
        "rank",
    }
    for suffix in ("bucket", "count", "sum"):
        found = labels.pop(f"vllm:lora_adapter_load_seconds_{suffix}")
        assert found - {"le"} == {"model_name", "transition"}
    assert all(found == {"model_name"} for found in labels.values()) and len(labels) == 6


def test_the_gateways_scorers() -> None:
    busy, empty = scraped(made()), scraped(made(running=0, waiting=1, kv_blocks_free=10))
    names = ("sql", "pirate", "far", "unknown")
    assert [lora_affinity(busy, name) for name in names] == [1.0, 0.6, 0.6, 0.0]
    free = scraped(metrics(snapshot=stats(slot(0, "FREE"), slot(1, "FREE")), compat="vllm"))
    assert lora_affinity(free, "unknown") == 0.8
    assert queue_scores([busy, empty, free]) == [0.0, pytest.approx(6 / 7), 1.0]
    assert queue_scores([busy, busy]) == [1.0, 1.0]
    assert [1 - at.kv for at in (busy, empty)] == [pytest.approx(0.4), 1.0]


def test_llm_ds_scorer() -> None:
    found = scraped(made())
    assert [load_state(found, name) for name in ("sql", "pirate", "unknown")] == [1.0, 0.7, 0.6]
    full = scraped(
        metrics(
            snapshot=stats(slot(0, "READY", "a", 1)), adapters=[info("a", "slot", pinned=True)], compat="vllm"
        )
    )
    assert load_state(full, "unknown") == 0.0
    assert priced_load_state(found, "pirate", 2.0) == pytest.approx(1 - 0.02 / 2)
    assert priced_load_state(found, "unknown", 2.0) == pytest.approx(1 - 0.32 / 2)
    assert priced_load_state(found, "unknown", 0.3) == 0.0


def test_no_adapters_are_empty_lists_and_zeros_from_the_start() -> None:
    text = metrics(snapshot=stats(slot(0, "FREE")), compat="vllm").expose()[0].decode()
    found = endpoint(text)
    assert (found.max_active, found.active, found.waiting, found.on_gpu) == (1, [], [], 0)
    assert (found.load_seconds, found.activate_seconds) == (0.0, 0.0)


def test_types_and_that_they_are_there_only_if_asked_for() -> None:
    types = {f.name: f.type for f in families(made()) if f.name.startswith("vllm:")}
    assert types.pop("vllm:lora_adapter_load_seconds") == "histogram"
    assert set(types.values()) == {"gauge"} and len(types) == 8
    assert not [f for f in families(metrics()) if f.name.startswith("vllm:")]
