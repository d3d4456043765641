"""Requests as OpenTelemetry spans."""

from __future__ import annotations

import asyncio

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, make_engine, tiny, tiny_of
from support.metric_script import added, admitted, ended, evicted, first_token, placed, registered

from aioengine import events
from aioengine.errors import AdapterLoadError

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from aioengine.metrics.tracing import RequestTracer, trace_requests

__all__ = ["make_engine", "tiny", "tiny_of"]  # fixtures


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


def seconds(span: ReadableSpan) -> tuple[str, float, float]:
    assert span.start_time is not None and span.end_time is not None
    return span.name, span.start_time / 1e9, span.end_time / 1e9


def traced(provider: TracerProvider, *script: events.Event) -> RequestTracer:
    tracer = RequestTracer(provider.get_tracer("test"), {}, offset=1000.0)
    for event in script:
        tracer.handle(event)
    return tracer


def at(event: events.Event, moment: float) -> events.Event:
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    return type(event)(**{**fields, "time": moment})


def test_stages_of_a_request(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    traced(
        provider,
        registered("a"),
        added("a", time=1.0),
        placed("a", 0, time=2.0),
        evicted("a", 0, time=3.0),
        placed("a", 0, version=9, time=3.5),  # another version: not the one it waits for
        placed("a", 0, time=4.0),
        admitted("a", time=5.0),
        at(first_token("a"), 6.0),
        at(events.RequestPreempted(time=0.0, request_id="r", adapter="a"), 7.0),
        admitted("a", time=8.0, resumed=True),
        at(ended("a", "length"), 9.0),
    )
    spans = exporter.get_finished_spans()
    assert [seconds(span) for span in spans] == [
        ("adapter_wait", 1001, 1002),
        ("adapter_wait", 1003, 1004),
        ("queue", 1001, 1005),
        ("prefill", 1005, 1006),
        ("decode", 1006, 1007),
        ("queue", 1007, 1008),
        ("decode", 1008, 1009),
        ("aioengine.request", 1001, 1009),
    ]
    root = spans[-1]
    assert root.context is not None
    assert {span.parent.span_id for span in spans[:-1] if span.parent} == {root.context.span_id}
    assert dict(root.attributes or {}) == {
        "aioengine.request_id": "r",
        "aioengine.adapter": "a",
        "aioengine.adapter_version": 1,
        "aioengine.cached_tokens": 3,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert [event.name for event in root.events] == ["preempted", "resumed"]


def test_who_gives_up_in_the_queue(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    traced(provider, registered("a"), added("a", time=1.0), at(ended("a", "abort"), 3.0))
    assert [seconds(span) for span in exporter.get_finished_spans()] == [
        ("adapter_wait", 1001, 1003),
        ("queue", 1001, 1003),
        ("aioengine.request", 1001, 1003),
    ]


async def test_what_fails_and_what_is_under_way_at_the_end(
    tiny: Tiny, make_engine: MakeEngine, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    async with make_engine(tiny) as engine:
        engine.register_adapter("broken", "/nowhere")
        stop = trace_requests(engine, provider)
        with pytest.raises(AdapterLoadError):
            await engine.complete([1], adapter="broken", request_id="broken")
        left = asyncio.create_task(engine.complete([9], greedy(100), request_id="left"))
        await asyncio.sleep(0)
        stop()
        await left
    roots = [span for span in exporter.get_finished_spans() if span.name == "aioengine.request"]
    failed, unended = roots
    assert [dict(span.attributes or {})["aioengine.request_id"] for span in roots] == ["broken", "left"]
    assert failed.status.status_code is StatusCode.ERROR and unended.status.status_code is StatusCode.UNSET
    assert [event.name for event in failed.events] == ["exception"]
