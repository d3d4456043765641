"""Requests as OpenTelemetry traces (extra ``otel``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from opentelemetry.trace import Span, Status, StatusCode, Tracer, TracerProvider, set_span_in_context

from aioengine import events
from aioengine.info import AdapterInfo, EngineStats

_Change = events.RequestAdmitted | events.RequestPreempted | events.FirstToken | events.RequestEnded


class Traceable(Protocol):
    """A running engine."""

    def add_listener(self, listener: Callable[[events.Event], None]) -> Callable[[], None]: ...
    def adapters(self) -> list[AdapterInfo]: ...
    def stats(self) -> EngineStats: ...


def trace_requests(engine: Traceable, tracer_provider: TracerProvider) -> Callable[[], None]:
    """Make a span of each request, with children. Returns a function that ends this. Call it on the event
    loop.

    The span ``aioengine.request`` is a child of the span that is current where the request is made. Its
    own children are ``queue`` (waiting to be admitted; once more after a preemption), ``adapter_wait``
    (that part of the waiting in which the adapter was in no slot), ``prefill`` (admission to first
    token) and ``decode`` (first token to the end). The last two name the steps that they took, from
    ``aioengine.first_step`` to ``aioengine.last_step``: events and logs have the same numbers. Requests that
    are already under way are left out.
    """
    clock = asyncio.get_running_loop().time
    versions = {info.name: info.version for info in engine.adapters()}
    tracer = RequestTracer(
        tracer_provider.get_tracer("aioengine"),
        versions,
        offset=time.time() - clock(),
        step=engine.stats().steps + 1,
    )
    remove = engine.add_listener(tracer.handle)

    def stop() -> None:
        remove()
        tracer.close(clock())

    return stop


class _Trace:
    """One request's open spans."""

    def __init__(self, root: Span, key: tuple[str, int] | None) -> None:
        self.root = root
        self.key = key
        """Name and version of its adapter."""
        self.stage: Span | None = None
        self.wait: Span | None = None
        self.computes = False
        """Whether the open stage consists of steps, and not of waiting."""
        self.generating = False
        """Whether it has had its first token."""


class RequestTracer:
    """Turns events into spans. ``offset`` is Unix time minus the events' clock, in seconds; ``step`` is the
    number of the engine's next step."""

    def __init__(self, tracer: Tracer, versions: dict[str, int], *, offset: float, step: int = 1) -> None:
        self._tracer = tracer
        self._versions = versions
        self._offset = offset
        self._traces: dict[str, _Trace] = {}
        self._step = step
        """The running or next step."""
        self._waiting: dict[tuple[str, int], dict[str, _Trace]] = {}
        """Traces of the requests that wait to be admitted, by adapter and version."""

    def handle(self, event: events.Event) -> None:
        match event:
            case events.RequestAdded():
                self._added(event)
            case (
                events.RequestAdmitted()
                | events.RequestPreempted()
                | events.FirstToken()
                | events.RequestEnded()
            ):
                trace = self._traces.get(event.request_id)
                if trace is not None:
                    self._changed(trace, event)
            case events.StepFinished():
                self._step = event.step + event.steps
            case events.AdapterRegistered():
                self._versions[event.adapter] = event.version
            case events.AdapterUnloaded():
                if self._versions.get(event.adapter) == event.version:
                    del self._versions[event.adapter]
            case events.AdapterPlaced():
                for trace in self._waiting.get((event.adapter, event.version), {}).values():
                    self._end_wait(trace, event.time)
            case events.AdapterEvicted(level="slot"):
                for trace in self._waiting.get((event.adapter, event.version), {}).values():
                    self._begin_wait(trace, event.time)

    def close(self, now: float) -> None:
        """End the spans of the requests that are under way."""
        for request_id in list(self._traces):
            self._end(request_id, now)

    def _added(self, event: events.RequestAdded) -> None:
        key = None if event.adapter is None else (event.adapter, self._versions.get(event.adapter, 0))
        attributes: dict[str, str | int] = {
            "aioengine.request_id": event.request_id,
            "gen_ai.usage.input_tokens": event.prompt_tokens,
        }
        if key is not None:
            attributes |= {"aioengine.adapter": key[0], "aioengine.adapter_version": key[1]}
        if event.tenant is not None:
            attributes["aioengine.tenant"] = event.tenant
        root = self._tracer.start_span(
            "aioengine.request", attributes=attributes, start_time=self._unix_ns(event.time)
        )
        trace = self._traces[event.request_id] = _Trace(root, key)
        self._queue(event.request_id, trace, event.time)
        if key is not None and event.location != "slot":
            self._begin_wait(trace, event.time)

    def _changed(self, trace: _Trace, event: _Change) -> None:
        request_id, now = event.request_id, self._unix_ns(event.time)
        match event:
            case events.RequestAdmitted():
                self._unqueue(request_id, trace, event.time)
                if event.resumed:
                    trace.root.add_event("resumed", timestamp=now)
                else:
                    trace.root.set_attribute("aioengine.cached_tokens", event.cached_tokens)
                self._stage(trace, "decode" if trace.generating else "prefill", event.time)
            case events.RequestPreempted():
                trace.root.add_event("preempted", timestamp=now)
                self._queue(request_id, trace, event.time)
            case events.FirstToken():
                trace.generating = True
                self._stage(trace, "decode", event.time)
            case events.RequestEnded():
                trace.root.set_attribute("gen_ai.usage.output_tokens", event.output_tokens)
                trace.root.set_attribute("gen_ai.response.finish_reasons", [event.reason])
                if event.error is not None:
                    trace.root.record_exception(event.error, timestamp=now)
                if event.reason == "error":
                    trace.root.set_status(Status(StatusCode.ERROR, str(event.error)))
                self._end(request_id, event.time)

    def _queue(self, request_id: str, trace: _Trace, now: float) -> None:
        self._stage(trace, "queue", now)
        if trace.key is not None:
            self._waiting.setdefault(trace.key, {})[request_id] = trace

    def _unqueue(self, request_id: str, trace: _Trace, now: float) -> None:
        self._end_wait(trace, now)
        if trace.key is not None and trace.key in self._waiting:
            self._waiting[trace.key].pop(request_id, None)
            if not self._waiting[trace.key]:
                del self._waiting[trace.key]

    def _end(self, request_id: str, now: float) -> None:
        trace = self._traces.pop(request_id)
        self._unqueue(request_id, trace, now)
        self._end_stage(trace, now)
        trace.root.end(self._unix_ns(now))

    def _stage(self, trace: _Trace, name: str, now: float) -> None:
        self._end_stage(trace, now)
        trace.stage = self._child(trace, name, now)
        trace.computes = name != "queue"
        if trace.computes:
            trace.stage.set_attribute("aioengine.first_step", self._step)

    def _end_stage(self, trace: _Trace, now: float) -> None:
        if trace.stage is not None:
            if trace.computes:
                trace.stage.set_attribute("aioengine.last_step", self._step)
            trace.stage.end(self._unix_ns(now))

    def _begin_wait(self, trace: _Trace, now: float) -> None:
        if trace.wait is None:
            trace.wait = self._child(trace, "adapter_wait", now)

    def _end_wait(self, trace: _Trace, now: float) -> None:
        if trace.wait is not None:
            trace.wait.end(self._unix_ns(now))
            trace.wait = None

    def _child(self, trace: _Trace, name: str, now: float) -> Span:
        return self._tracer.start_span(
            name, context=set_span_in_context(trace.root), start_time=self._unix_ns(now)
        )

    def _unix_ns(self, now: float) -> int:
        return int((now + self._offset) * 1e9)
