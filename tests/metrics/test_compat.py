"""The series for request routers, read as the model server protocol prescribes."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric
from support.metric_script import families, info, metrics, slot, stats

from aioengine import AdapterInfo
from aioengine.metrics import EngineMetrics


def waiting(name: str, location: str) -> AdapterInfo:
    known = info(name, location)
    fields = {field: getattr(known, field) for field in AdapterInfo.__struct_fields__}
    return AdapterInfo(**{**fields, "waiting": 3})


def router_view(made: EngineMetrics) -> dict[str, object]:
    """What an endpoint picker makes of a scrape: the newest lora_requests_info, its lists by comma."""
    found: dict[str, Metric] = {family.name: family for family in families(made)}
    newest = max(found["vllm:lora_requests_info"].samples, key=lambda sample: sample.value)
    lists = {
        key: [name for name in newest.labels[key].split(",") if name]
        for key in ("running_lora_adapters", "waiting_lora_adapters")
    }
    return {
        "max_lora": int(newest.labels["max_lora"]),
        **lists,
        "updated": newest.value,
        "series": len(found["vllm:lora_requests_info"].samples),
        "queued": found["vllm:num_requests_waiting"].samples[0].value,
        "running": found["vllm:num_requests_running"].samples[0].value,
        "kv": found["vllm:kv_cache_usage_perc"].samples[0].value,
    }


def made(clock: float = 1234.5) -> EngineMetrics:
    snapshot = stats(
        slot(0, "READY", "sql", 1),
        slot(1, "READY", "json/v2", 1),
        slot(2, "LOADING", "pirate", 1),
        slot(3, "DRAINING", "old", 1),
        running=5,
        waiting=7,
        waiting_for_adapter=4,
        kv_blocks=10,
        kv_blocks_free=4,
    )
    adapters = [waiting("sql", "slot"), info("json/v2", "slot"), waiting("pirate", "cpu")]
    adapters += [waiting("far", "disk"), info("idle", "disk")]
    return EngineMetrics(10, lambda: snapshot, lambda: adapters, compat="vllm", clock=lambda: clock)


def test_the_router_sees_what_is_in_the_slots() -> None:
    assert router_view(made()) == {
        "max_lora": 4,
        "running_lora_adapters": ["sql", "json/v2"],  # not the one being written, nor the draining one
        "waiting_lora_adapters": ["pirate", "far"],  # what waits for "sql" waits for no adapter
        "updated": 1234.5,
        "series": 1,
        "queued": 7,
        "running": 5,
        "kv": 0.6,
    }


def test_no_adapters_are_empty_lists() -> None:
    view = router_view(metrics(snapshot=stats(slot(0, "FREE")), compat="vllm"))
    assert (view["max_lora"], view["running_lora_adapters"], view["waiting_lora_adapters"]) == (1, [], [])


def test_residency_by_adapter() -> None:
    family = next(f for f in families(made()) if f.name == "vllm:lora_adapter_loaded")
    assert [(s.labels["adapter_name"], s.labels["level"], s.labels["pinned"]) for s in family.samples] == [
        ("sql", "slot", "false"),
        ("json/v2", "slot", "false"),
        ("pirate", "cpu", "false"),
    ]


def test_all_are_gauges_and_there_only_if_asked_for() -> None:
    assert {f.type for f in families(made()) if f.name.startswith("vllm:")} == {"gauge"}
    assert not [f for f in families(metrics()) if f.name.startswith("vllm:")]
