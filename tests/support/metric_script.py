"""Metrics of a scripted list of events: short forms of the events, and what the exposition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
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

USUAL: dict[str, Any] = {
    "time": 0.0,
    "version": 1,
    "path": "/x",
    "rank": 8,
    "nbytes": 1000,
    "request_id": "r",
    "prompt_tokens": 5,
    "output_tokens": 7,
    "cached_tokens": 3,
    "queue_seconds": 0.3,
    "resumed": False,
    "reason": "stop",
}
"""Values of fields that a script does not give; others are None."""


def short(kind: type[events.Event], *names: str, **usual: Any) -> Callable[..., events.Event]:
    """Make events of this kind of the values of these fields, and of others by name."""

    def made(*values: Any, **fields: Any) -> events.Event:
        needed = [field.name for field in msgspec.structs.fields(kind) if field.required]
        given = dict(zip(names, values, strict=False))
        return kind(**{name: USUAL.get(name) for name in needed} | usual | given | fields)

    return made


registered = short(events.AdapterRegistered, "adapter")
loaded = short(events.AdapterLoaded, "adapter", seconds=0.02)
placed = short(events.AdapterPlaced, "adapter", "slot", seconds=0.004)
unloaded = short(events.AdapterUnloaded, "adapter")
added = short(events.RequestAdded, "adapter")
admitted = short(events.RequestAdmitted, "adapter")
first_token = short(events.FirstToken, "adapter", "request_id", seconds=0.4)
ended = short(events.RequestEnded, "adapter", "reason", seconds=1.5)


def evicted(adapter: str, index: int | None, version: int = 1, time: float = 0.0) -> events.Event:
    level = "cpu" if index is None else "slot"
    return events.AdapterEvicted(time=time, adapter=adapter, version=version, level=level, slot=index)


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
