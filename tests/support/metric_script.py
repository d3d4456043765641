"""Metrics of a scripted list of events: short forms of the events, and what the exposition says."""

from __future__ import annotations

from typing import Literal

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.adapter_infos import adapter_info

from aioengine import events
from aioengine.info import AdapterInfo, EngineStats, SlotInfo, SlotStateName
from aioengine.metrics import EngineMetrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def slot(
    index: int, state: SlotStateName, adapter: str | None = None, version: int | None = None
) -> SlotInfo:
    return SlotInfo(index=index, state=state, adapter=adapter, version=version, running=0, pinned=False)


def stats(*slots: SlotInfo, **values: int) -> EngineStats:
    names = [n for n in EngineStats.__struct_fields__ if n not in ("slots", "waiting_for")]
    return EngineStats(slots=slots, **{name: values.get(name, 0) for name in names})


def info(name: str, location: str, *, pinned: bool = False) -> AdapterInfo:
    slot = 0 if location == "slot" else None
    return adapter_info(name, path="/somewhere", bytes=1000, location=location, slot=slot, pinned=pinned)


def metrics(
    *script: events.Event,
    labels: int = 100,
    snapshot: EngineStats | None = None,
    adapters: list[AdapterInfo] | None = None,
    compat: Literal["none", "vllm"] = "none",
) -> EngineMetrics:
    """An engine's metrics that have seen ``script``."""
    made = EngineMetrics(
        labels, lambda: snapshot or stats(), lambda: adapters or [], compat=compat, model_name=lambda: "base"
    )
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


def collected(made: EngineMetrics) -> Samples:
    """The same as :func:`samples`, without the detour over text: for tests that scrape often."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in made.registry.collect()
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    """One series' value; None if there is no such series."""
    return found.get((f"aioengine_{name}", frozenset({"engine": "default", **labels}.items())))


def by_label(found: Samples, name: str, label: str) -> dict[str, float]:
    """The values of all series of a metric by one of their labels."""
    return {
        dict(labels)[label]: number for (full, labels), number in found.items() if full == f"aioengine_{name}"
    }


# Short forms of the events


def registered(adapter: str, version: int = 1, replaces: int | None = None) -> events.Event:
    return events.AdapterRegistered(time=0.0, adapter=adapter, version=version, path="/x", replaces=replaces)


def loaded(adapter: str, version: int = 1, seconds: float = 0.02, time: float = 0.0) -> events.Event:
    return events.AdapterLoaded(
        time=time, adapter=adapter, version=version, rank=8, nbytes=1000, seconds=seconds
    )


def placed(
    adapter: str, index: int, version: int = 1, seconds: float = 0.004, time: float = 0.0
) -> events.Event:
    return events.AdapterPlaced(
        time=time,
        adapter=adapter,
        version=version,
        slot=index,
        rank=8,
        nbytes=1000,
        seconds=seconds,
    )


def evicted(adapter: str, index: int | None, version: int = 1, time: float = 0.0) -> events.Event:
    level = "cpu" if index is None else "slot"
    return events.AdapterEvicted(time=time, adapter=adapter, version=version, level=level, slot=index)


def added(adapter: str | None, request_id: str = "r", time: float = 0.0) -> events.Event:
    return events.RequestAdded(
        time=time, request_id=request_id, adapter=adapter, prompt_tokens=5, tenant=None
    )


def admitted(
    adapter: str | None, request_id: str = "r", time: float = 0.0, *, resumed: bool = False
) -> events.Event:
    return events.RequestAdmitted(
        time=time,
        request_id=request_id,
        adapter=adapter,
        slot=None,
        cached_tokens=3,
        queue_seconds=0.3,
        resumed=resumed,
    )


def ended(adapter: str | None, reason: events.EndReason = "stop", request_id: str = "r") -> events.Event:
    return events.RequestEnded(
        time=0.0,
        request_id=request_id,
        adapter=adapter,
        reason=reason,
        error=None,
        prompt_tokens=5,
        output_tokens=7,
        seconds=1.5,
        tenant=None,
    )


def unloaded(adapter: str, version: int = 1) -> events.Event:
    return events.AdapterUnloaded(time=0.0, adapter=adapter, version=version)


def first_token(adapter: str | None, request_id: str = "r", seconds: float = 0.4) -> events.Event:
    return events.FirstToken(time=0.0, request_id=request_id, adapter=adapter, seconds=seconds)


def step(
    prefill: int,
    decode: int,
    *,
    slots: tuple[int, ...] = (),
    intervals: tuple[events.TokenInterval, ...] = (),
) -> events.Event:
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
        policy_seconds=0.0001,
        intervals=intervals,
    )
