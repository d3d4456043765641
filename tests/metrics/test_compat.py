"""The series for request routers: what the endpoint pickers of the Gateway API inference extension and of
llm-d read of a scrape's text."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.metric_script import families, info, loaded, metrics, placed, slot, stats

from aioengine import AdapterInfo
from aioengine.metrics import EngineMetrics

MODEL = {"model_name"}
LABELS = {
    "num_requests_running": MODEL,
    "num_requests_waiting": MODEL,
    "kv_cache_usage_perc": MODEL,
    "max_gpu_lora_adapters": MODEL,
    "num_gpu_loaded_lora_adapters": MODEL,
    "num_cpu_loaded_lora_adapters": MODEL,
    "lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    "lora_adapter_loaded": {"model_name", "adapter_name", "level", "pinned", "rank"},
    "lora_adapter_load_seconds_bucket": {"model_name", "transition", "le"},
    "lora_adapter_load_seconds_count": {"model_name", "transition"},
    "lora_adapter_load_seconds_sum": {"model_name", "transition"},
}
"""Labels of the series, by their names without ``vllm:``; the label "engine" is ours."""

Scrape = dict[str, list[tuple[dict[str, str], float]]]


def scraped(engine: EngineMetrics) -> Scrape:
    """Labels and values of the series, by their names."""
    found: Scrape = {}
    for family in text_string_to_metric_families(engine.expose()[0].decode()):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                labels = {name: value for name, value in sample.labels.items() if name != "engine"}
                found.setdefault(sample.name.removeprefix("vllm:"), []).append((labels, sample.value))
    return found


def waiting(name: str, location: str) -> AdapterInfo:
    return msgspec.structs.replace(info(name, location), waiting=3)


def made() -> EngineMetrics:
    snapshot = stats(
        slot(0, "READY", "sql", 1),
        slot(1, "READY", "json/v2", 1),
        slot(2, "LOADING", "pirate", 1),
        slot(3, "FREE"),
        running=5,
        waiting=7,
        waiting_for_adapter=4,
        kv_blocks=10,
        kv_blocks_free=4,
    )
    adapters = [waiting("sql", "slot"), info("json/v2", "slot", pinned=True), waiting("pirate", "cpu")]
    adapters += [waiting("far", "disk"), info("idle", "disk")]
    engine = EngineMetrics(
        10,
        lambda: snapshot,
        lambda: adapters,
        compat="vllm",
        clock=lambda: 1234.5,
        model_name=lambda: "org/base",
    )
    moves = [("sql", 0, 0.2, 0.01), ("json/v2", 1, 0.4, 0.03)]
    for name, index, read, copied in moves:
        engine.handle(loaded(name, seconds=read))
        engine.handle(placed(name, index, seconds=copied))
    return engine


def test_routers_see_what_is_in_the_slots_and_what_waits() -> None:
    found = scraped(made())
    assert {name: set(series[0][0]) for name, series in found.items()} == LABELS
    of_model = {name: series[0] for name, series in found.items() if LABELS[name] == MODEL}
    assert all(labels == {"model_name": "org/base"} for labels, _ in of_model.values())
    assert {name: value for name, (_, value) in of_model.items()} == {
        "num_requests_running": 5,
        "num_requests_waiting": 7,
        "kv_cache_usage_perc": 0.6,
        "max_gpu_lora_adapters": 4,
        "num_gpu_loaded_lora_adapters": 2,
        "num_cpu_loaded_lora_adapters": 3,
    }
    lists = {"running_lora_adapters": "sql,json/v2", "waiting_lora_adapters": "pirate,far"}
    assert found["lora_requests_info"] == [({"max_lora": "4", **lists}, 1234.5)]
    held = [
        (labels["adapter_name"], labels["level"], labels["pinned"])
        for labels, _ in found["lora_adapter_loaded"]
    ]
    assert held == [("sql", "gpu", "false"), ("json/v2", "gpu", "true"), ("pirate", "cpu", "false")]
    seconds = {labels["transition"]: value for labels, value in found["lora_adapter_load_seconds_sum"]}
    assert seconds == {"load": pytest.approx(0.6), "activate": pytest.approx(0.04)}


def test_no_adapters_are_empty_lists_and_zeros_from_the_start() -> None:
    found = scraped(metrics(snapshot=stats(slot(0, "FREE")), compat="vllm"))
    lists = {"running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert found["lora_requests_info"][0][0] == {"max_lora": "1", **lists}
    assert [value for _, value in found["lora_adapter_load_seconds_count"]] == [0.0, 0.0]
    assert "lora_adapter_loaded" not in found and found["num_gpu_loaded_lora_adapters"][0][1] == 0


def test_types_and_that_they_are_there_only_if_asked_for() -> None:
    types = {f.name: f.type for f in families(made()) if f.name.startswith("vllm:")}
    assert types.pop("vllm:lora_adapter_load_seconds") == "histogram"
    assert set(types.values()) == {"gauge"} and len(types) == 8
    assert not [f for f in families(metrics()) if f.name.startswith("vllm:")]
