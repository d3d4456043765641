"""The series for request routers: what the endpoint pickers of the Gateway API inference extension and of
llm-d read of a scrape's text."""

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
