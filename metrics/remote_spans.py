"""Spans across processes, in the form of W3C Trace Context (extra ``otel``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from opentelemetry import context, propagate, trace

Headers = list[tuple[bytes, bytes]]


class Answered(Protocol):
    """Facts about an HTTP request that has been answered."""

    request_id: str
    method: str
    path: str
    route: str
    status: int
    tenant: str | None
    adapter: str | None
    error: str | None
    reason: str | None
    trace_id: str | None


class HttpSpans:
    """The server's side: a span of each HTTP request, the child of the one that its ``traceparent`` names."""

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._tracer = provider.get_tracer("aioengine")

    @contextmanager
    def request(self, headers: Headers, record: Answered) -> Iterator[None]:
        """Context in which the span is the current one; ``record.trace_id`` is its trace. At the end it gets
        its name from the record."""
        carrier = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
        span = self._tracer.start_span(
            record.method, context=propagate.extract(carrier), kind=trace.SpanKind.SERVER
        )
        record.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        token = context.attach(trace.set_span_in_context(span))
        try:
            yield
        finally:
            context.detach(token)
            _describe(span, record)
            span.end()


def _describe(span: trace.Span, record: Answered) -> None:
    span.update_name(f"{record.method} {record.route}")
    attributes: dict[str, str | int | None] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "aioengine.request_id": record.request_id,
        "aioengine.tenant": record.tenant,
        "aioengine.adapter": record.adapter,
        "error.type": record.error,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    if record.status >= 500:
        span.set_status(trace.Status(trace.StatusCode.ERROR, record.reason))


class CallSpans:
    """A gateway's side: a span of each request to the fleet, with a child for each replica of the request.

    The span is a child of the span that is current when it is made.
    """

    def __init__(self, provider: trace.TracerProvider, request_id: str, adapter: str | None) -> None:
        self._tracer = provider.get_tracer("aioengine")
        attributes = {"aioengine.request_id": request_id}
        if adapter is not None:
            attributes["aioengine.adapter"] = adapter
        self._root = self._tracer.start_span("aioengine.fleet.request", attributes=attributes)
        self._sent: trace.Span | None = None

    def sent(self, replica: str, delivered: int) -> dict[str, str]:
        """Note that the request goes to ``replica``, after ``delivered`` of its tokens. Returns the carrier
        for the replica."""
        self._sent = self._tracer.start_span(
            "aioengine.fleet.attempt",
            context=trace.set_span_in_context(self._root),
            kind=trace.SpanKind.CLIENT,
            attributes={"aioengine.replica": replica, "aioengine.delivered_tokens": delivered},
        )
        carrier: dict[str, str] = {}
        propagate.inject(carrier, context=trace.set_span_in_context(self._sent))
        return carrier

    def lost(self, how: str) -> None:
        """Note that the request's replica is lost, or has refused it."""
        if self._sent is not None:
            self._sent.set_status(trace.Status(trace.StatusCode.ERROR, how))
            self._sent.end()
            self._sent = None

    def end(self, error: BaseException | None = None) -> None:
        if error is not None:
            self._root.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
        for span in (self._sent, self._root):
            if span is not None:
                span.end()


@contextmanager
def carried(carrier: Mapping[str, str]) -> Iterator[None]:
    """Context in which new spans are children of the span that came with ``carrier``."""
    token = context.attach(propagate.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)
