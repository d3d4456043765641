"""A scripted list of events goes in, and the exposition text must say what happened."""

from __future__ import annotations

import re

from support.metric_script import (
    added,
    admitted,
    by_label,
    ended,
    evicted,
    families,
    info,
    loaded,
    metrics,
    placed,
    registered,
    samples,
    slot,
    stats,
    step,
    value,
)

from aioengine import events
from aioengine.metrics.families import definitions


def test_policy_and_event_loop() -> None:
    refused = events.PolicyRefused(time=0.0, reason="place_slot_busy", item="x")
    found = samples(
        metrics(
            refused,
            refused,
            events.PolicyFailed(time=0.0, error="boom"),
            events.PolicyOverran(time=0.0, seconds=0.1, budget=0.02),
            events.PolicyOverran(time=0.0, seconds=0.1, budget=0.02),
            events.PolicyReplaced(time=0.0, reason="slow"),
            events.LoopLag(time=0.0, seconds=0.2),
        )
    )
    assert value(found, "policy_refusals_total", reason="place_slot_busy") == 2
    assert value(found, "policy_errors_total") == 1
    assert value(found, "policy_overruns_total") == 2
    assert value(found, "policy_replacements_total") == 1
    assert value(found, "event_loop_lag_seconds_bucket", le="0.1") == 0
    assert value(found, "event_loop_lag_seconds_bucket", le="0.25") == 1


def test_snapshot_of_slots_queues_and_cache() -> None:
    snapshot = stats(
        slot(0, "READY", "sql", 2),
        slot(1, "LOADING", "json", 1),
        slot(2, "DRAINING", "sql", 1),
        slot(3, "FREE"),
        running=5,
        waiting=7,
        waiting_for_adapter=4,
        kv_blocks=100,
        kv_blocks_free=25,
        cpu_adapters=3,
        adapters=9,
    )
    adapters = [info("sql", "slot", pinned=True), info("json", "cpu"), info("far", "disk")]
    made = metrics(loaded("sql", version=2), loaded("json"), snapshot=snapshot, adapters=adapters)
    found = samples(made)
    assert by_label(found, "lora_slots", "state") == {"free": 1, "loading": 1, "ready": 1, "draining": 1}
    assert value(found, "lora_slot_info", slot="0", adapter="sql", version="2", rank="8") == 1
    assert value(found, "lora_slot_info", slot="1", adapter="json", version="1", rank="8") == 1
    loaded_series = {
        tuple(sorted(dict(labels).items()))
        for name, labels in found
        if name == "aioengine_lora_adapter_loaded"
    }
    engine = ("engine", "default")
    assert loaded_series == {
        (("adapter", "sql"), engine, ("level", "slot"), ("pinned", "true")),
        (("adapter", "json"), engine, ("level", "cpu"), ("pinned", "false")),
    }
    assert value(found, "requests_running") == 5
    assert value(found, "requests_waiting", reason="adapter") == 4
    assert value(found, "requests_waiting", reason="capacity") == 3
    assert value(found, "kv_cache_usage_ratio") == 0.75
    assert value(found, "lora_cpu_adapters") == 3
    assert value(found, "lora_adapters") == 9


def test_naming_rules() -> None:
    script = [registered("a"), loaded("a"), placed("a", 0), evicted("a", 0), added("a")]
    script += [admitted("a"), ended("a"), step(1, 1, slots=(0,))]
    made = metrics(*script, snapshot=stats(slot(0, "READY", "a", 1)))
    found = families(made)
    assert [family.name for family in found] == [*dict.fromkeys(family.name for family in found)]
    assert {family.name for family in found} == {definition.name for definition in definitions.OWN.values()}
    for family in found:
        assert re.fullmatch(r"aioengine_[a-z0-9]+(_[a-z0-9]+)*", family.name)
        assert family.documentation.endswith((".", "?")), f"{family.name} has no help text"
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert sample.labels["engine"] == "default"
        if family.type == "histogram" and not family.name.startswith("aioengine_batch_"):
            assert family.name.endswith("_seconds")
        assert "milliseconds" not in family.name and not family.name.endswith("_ms")


def test_engines_do_not_collide() -> None:
    one, two = metrics(ended("a")), metrics()
    assert value(samples(one), "prompt_tokens_total", adapter="a") == 5
    assert value(samples(two), "prompt_tokens_total", adapter="a") is None
