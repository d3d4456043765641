"""A scripted list of events goes in, and the exposition text must say what happened."""

from __future__ import annotations

import re
import time

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from aioengine import events
from aioengine.info import AdapterInfo, EngineStats, SlotInfo, SlotStateName
from aioengine.metrics import EngineMetrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def slot(
    index: int, state: SlotStateName, adapter: str | None = None, version: int | None = None
) -> SlotInfo:
    return SlotInfo(index=index, state=state, adapter=adapter, version=version, running=0, pinned=False)


def stats(*slots: SlotInfo, **values: int) -> EngineStats:
    names = [n for n in EngineStats.__struct_fields__ if n != "slots"]
    return EngineStats(slots=slots, **{name: values.get(name, 0) for name in names})


def info(name: str, location: str, *, pinned: bool = False) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        version=1,
        path="/somewhere",
        rank=8,
        bytes=1000,
        location=location,  # type: ignore[arg-type]
        slot=0 if location == "slot" else None,
        pinned=pinned,
        running=0,
        waiting=0,
    )


def metrics(
    *script: events.Event,
    labels: int = 100,
    snapshot: EngineStats | None = None,
    adapters: list[AdapterInfo] | None = None,
) -> EngineMetrics:
    made = EngineMetrics(labels, lambda: snapshot or stats(), lambda: adapters or [])
    for event in script:
        made.handle(event)
    return made


def families(made: EngineMetrics) -> list[Metric]:
    return list(text_string_to_metric_families(generate_latest(made.registry).decode()))


def samples(made: EngineMetrics) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(made)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"aioengine_{name}", frozenset(labels.items())))


# Short forms of the events


def registered(adapter: str, version: int = 1, replaces: int | None = None) -> events.Event:
    return events.AdapterRegistered(time=0.0, adapter=adapter, version=version, path="/x", replaces=replaces)


def loaded(adapter: str, version: int = 1, seconds: float = 0.02) -> events.Event:
    return events.AdapterLoaded(
        time=0.0, adapter=adapter, version=version, rank=8, nbytes=1000, seconds=seconds
    )


def placed(adapter: str, index: int, version: int = 1, seconds: float = 0.004) -> events.Event:
    return events.AdapterPlaced(
        time=0.0,
        adapter=adapter,
        version=version,
        slot=index,
        rank=8,
        nbytes=1000,
        seconds=seconds,
    )


def evicted(adapter: str, index: int | None, version: int = 1) -> events.Event:
    level = "cpu" if index is None else "slot"
    return events.AdapterEvicted(time=0.0, adapter=adapter, version=version, level=level, slot=index)


def added(adapter: str | None, request_id: str = "r") -> events.Event:
    return events.RequestAdded(time=0.0, request_id=request_id, adapter=adapter, prompt_tokens=5, tenant=None)


def admitted(adapter: str | None, *, resumed: bool = False) -> events.Event:
    return events.RequestAdmitted(
        time=0.0,
        request_id="r",
        adapter=adapter,
        slot=None,
        cached_tokens=3,
        queue_seconds=0.3,
        resumed=resumed,
    )


def ended(adapter: str | None, reason: events.EndReason = "stop") -> events.Event:
    return events.RequestEnded(
        time=0.0,
        request_id="r",
        adapter=adapter,
        reason=reason,
        error=None,
        prompt_tokens=5,
        output_tokens=7,
        seconds=1.5,
        tenant=None,
    )


def step(prefill: int, decode: int, *, slots: tuple[int, ...] = ()) -> events.Event:
    return events.StepFinished(
        time=0.0,
        step=1,
        seconds=0.03,
        schedule_seconds=0.0002,
        sequences=3,
        adapters=len(slots),
        prefill_tokens=prefill,
        decode_tokens=decode,
        slots=slots,
    )


def test_swaps_are_counted_timed_and_weighed() -> None:
    found = samples(
        metrics(
            registered("sql"),
            loaded("sql"),
            placed("sql", 0),
            evicted("sql", 0),
            evicted("sql", None),
            loaded("sql"),
            placed("sql", 1),
            registered("sql", version=2, replaces=1),
        )
    )
    assert value(found, "lora_swaps_total", kind="load") == 2
    assert value(found, "lora_swaps_total", kind="evict") == 1  # leaving the CPU is no swap
    assert value(found, "lora_swaps_total", kind="replace") == 1
    assert value(found, "lora_swap_seconds_count", stage="disk") == 2
    assert value(found, "lora_swap_seconds_sum", stage="slot") == pytest.approx(0.008)
    assert value(found, "lora_swap_bytes_total", stage="disk") == 2000
    assert value(found, "lora_swap_bytes_total", stage="slot") == 2000


def test_cache_requests_by_level_and_version() -> None:
    made = metrics(registered("sql"), added("sql"))  # on disk
    made.handle(loaded("sql"))
    made.handle(added("sql"))  # on the CPU
    made.handle(placed("sql", 0))
    made.handle(added("sql"))  # in a slot
    made.handle(added(None))  # the base model needs no adapter
    made.handle(registered("sql", version=2, replaces=1))
    made.handle(added("sql"))  # version 1 in the slot is no hit for version 2
    found = samples(made)
    assert value(found, "lora_cache_requests_total", level="slot", result="hit") == 1
    assert value(found, "lora_cache_requests_total", level="slot", result="miss") == 3
    assert value(found, "lora_cache_requests_total", level="cpu", result="hit") == 1
    assert value(found, "lora_cache_requests_total", level="cpu", result="miss") == 2


def test_an_evicted_or_unloaded_adapter_is_a_miss() -> None:
    made = metrics(registered("a"), loaded("a"), placed("a", 0), evicted("a", 0), added("a"))
    made.handle(placed("a", 0))
    made.handle(events.AdapterUnloaded(time=0.0, adapter="a", version=1))
    made.handle(registered("a", version=2))
    made.handle(added("a"))
    found = samples(made)
    assert value(found, "lora_cache_requests_total", level="slot", result="hit") is None
    assert value(found, "lora_cache_requests_total", level="slot", result="miss") == 2
    assert value(found, "lora_cache_requests_total", level="cpu", result="miss") == 1


def test_load_failures_by_reason() -> None:
    failed = events.AdapterFailed(
        time=0.0, adapter="a", version=1, reason="too_large", error=ValueError("rank")
    )
    found = samples(metrics(failed, failed))
    assert value(found, "lora_load_failures_total", reason="too_large") == 2


def test_requests_by_adapter() -> None:
    first = events.FirstToken(time=0.0, request_id="r", adapter="sql", seconds=0.4)
    preempted = events.RequestPreempted(time=0.0, request_id="r", adapter="sql")
    found = samples(
        metrics(
            admitted("sql"),
            first,
            preempted,
            admitted("sql", resumed=True),
            ended("sql", "length"),
            admitted(None),
            ended(None),
        )
    )
    assert value(found, "request_queue_seconds_count", adapter="sql") == 1  # not once more
    assert value(found, "request_queue_seconds_sum", adapter="base") == pytest.approx(0.3)
    assert value(found, "request_ttft_seconds_bucket", adapter="sql", le="0.25") == 0
    assert value(found, "request_ttft_seconds_bucket", adapter="sql", le="0.5") == 1
    assert value(found, "request_e2e_seconds_sum", adapter="sql") == pytest.approx(1.5)
    assert value(found, "prompt_tokens_total", adapter="base") == 5
    assert value(found, "generation_tokens_total", adapter="sql") == 7
    assert value(found, "requests_finished_total", adapter="sql", reason="length") == 1
    assert value(found, "requests_finished_total", adapter="base", reason="stop") == 1
    assert value(found, "prompt_cached_tokens_total") == 6
    assert value(found, "preemptions_total") == 1


def test_steps_by_phase() -> None:
    found = samples(metrics(step(100, 0), step(20, 5, slots=(0, 1)), step(0, 6, slots=(1,))))
    for phase in ("prefill", "mixed", "decode"):
        assert value(found, "step_seconds_count", phase=phase) == 1
    assert value(found, "step_tokens_total", phase="prefill") == 120
    assert value(found, "step_tokens_total", phase="decode") == 11
    assert value(found, "batch_sequences_sum") == 9
    assert value(found, "batch_adapters_bucket", le="0.0") == 1
    assert value(found, "batch_adapters_sum") == 3
    assert value(found, "lora_slot_busy_seconds_total", slot="0") == pytest.approx(0.03)
    assert value(found, "lora_slot_busy_seconds_total", slot="1") == pytest.approx(0.06)
    assert value(found, "schedule_seconds_sum") == pytest.approx(0.0006)


def test_policy_refusals_and_errors() -> None:
    refused = events.PolicyRefused(time=0.0, reason="place_slot_busy", item="x")
    found = samples(metrics(refused, refused, events.PolicyFailed(time=0.0, error="boom")))
    assert value(found, "policy_refusals_total", reason="place_slot_busy") == 2
    assert value(found, "policy_errors_total") == 1


def test_adapter_labels_are_bounded() -> None:
    names = [None, "a", "b", "c", "d", "a", "base"]
    found = samples(metrics(*[ended(name) for name in names], labels=2))
    counts = {
        dict(labels)["adapter"]: number
        for (name, labels), number in found.items()
        if name == "aioengine_prompt_tokens_total"
    }
    assert counts == {"base": 5, "a": 10, "b": 5, "other": 15}


def test_an_adapter_called_base_is_not_the_base_model() -> None:
    found = samples(metrics(ended(None), ended("base"), ended("other")))
    assert value(found, "prompt_tokens_total", adapter="base") == 5
    assert value(found, "prompt_tokens_total", adapter="adapter:base") == 5
    assert value(found, "prompt_tokens_total", adapter="adapter:other") == 5


def test_no_adapter_labels_at_all() -> None:
    found = samples(metrics(ended("a"), labels=0))
    assert value(found, "prompt_tokens_total", adapter="other") == 5


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
    )
    adapters = [info("sql", "slot", pinned=True), info("json", "cpu"), info("far", "disk")]
    made = metrics(loaded("sql", version=2), loaded("json"), snapshot=snapshot, adapters=adapters)
    found = samples(made)
    for state in ("free", "loading", "ready", "draining"):
        assert value(found, "lora_slots", state=state) == 1
    assert value(found, "lora_slot_info", slot="0", adapter="sql", version="2", rank="8") == 1
    assert value(found, "lora_slot_info", slot="1", adapter="json", version="1", rank="8") == 1
    loaded_series = {
        tuple(sorted(dict(labels).items()))
        for name, labels in found
        if name == "aioengine_lora_adapter_loaded"
    }
    assert loaded_series == {
        (("adapter", "sql"), ("level", "slot"), ("pinned", "true")),
        (("adapter", "json"), ("level", "cpu"), ("pinned", "false")),
    }
    assert value(found, "requests_running") == 5
    assert value(found, "requests_waiting", reason="adapter") == 4
    assert value(found, "requests_waiting", reason="capacity") == 3
    assert value(found, "kv_cache_usage_ratio") == 0.75
    assert value(found, "lora_cpu_adapters") == 3


def test_slot_states_always_add_up() -> None:
    found = samples(metrics(snapshot=stats(slot(0, "FREE"), slot(1, "READY", "a", 1))))
    states = {
        dict(labels)["state"]: number
        for (name, labels), number in found.items()
        if name == "aioengine_lora_slots"
    }
    assert states == {"free": 1, "ready": 1, "loading": 0, "draining": 0}


def test_an_engine_without_kv_blocks_can_be_scraped() -> None:
    assert value(samples(metrics()), "kv_cache_usage_ratio") == 0


def test_naming_rules() -> None:
    script = [registered("a"), loaded("a"), placed("a", 0), evicted("a", 0), added("a")]
    script += [admitted("a"), ended("a"), step(1, 1, slots=(0,))]
    made = metrics(*script, snapshot=stats(slot(0, "READY", "a", 1)))
    found = families(made)
    names = [family.name for family in found if not family.name.endswith("_created")]
    assert len(names) == len(set(names)) > 20
    for family in found:
        assert re.fullmatch(r"aioengine_[a-z0-9]+(_[a-z0-9]+)*", family.name)
        assert family.documentation.endswith((".", "?")), f"{family.name} has no help text"
        if family.name.endswith("_created"):
            continue
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
        if family.type == "histogram" and not family.name.startswith("aioengine_batch_"):
            assert family.name.endswith("_seconds")
        assert "milliseconds" not in family.name and not family.name.endswith("_ms")


def test_engines_do_not_collide() -> None:
    one, two = metrics(ended("a")), metrics()
    assert value(samples(one), "prompt_tokens_total", adapter="a") == 5
    assert value(samples(two), "prompt_tokens_total", adapter="a") is None


def test_events_that_no_metric_is_made_of_are_passed_over() -> None:
    made = metrics()
    before = samples(made)
    made.handle(events.AdapterLoading(time=0.0, adapter="a", version=1))
    made.handle(events.AdapterPlacing(time=0.0, adapter="a", version=1, slot=0))
    counters = {key: v for key, v in samples(made).items() if not key[0].endswith("_created")}
    assert counters == {k: v for k, v in before.items() if not k[0].endswith("_created")}


def test_handling_an_event_is_cheap() -> None:
    made = metrics()
    event = step(0, 8, slots=(0, 1))
    made.handle(event)
    best = min(_seconds_for(made, event) for _ in range(5))
    assert best < 0.001, f"{best * 1e6:.0f} us for one event"  # measured: about 15 us


def _seconds_for(made: EngineMetrics, event: events.Event) -> float:
    start = time.perf_counter()
    for _ in range(20):
        made.handle(event)
    return (time.perf_counter() - start) / 20
