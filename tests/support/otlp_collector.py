"""An OpenTelemetry collector in this process: an HTTP server that decodes what is sent to it."""

from __future__ import annotations

import contextlib
import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


class SentSpan(NamedTuple):
    """Ids are in hexadecimal; ``parent`` is empty if it has none."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    failed: bool
    attributes: dict[str, object]
    resource: dict[str, object]


class Collector:
    """``spans`` are those that came so far."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[SentSpan] = []
        self.paths: set[str] = set()

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {each.key: value_of(each.value) for each in group.resource.attributes}
            for span in (span for scope in group.scope_spans for span in scope.spans):
                self.spans.append(
                    SentSpan(
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.kind,
                        span.status.code == 2,
                        {each.key: value_of(each.value) for each in span.attributes},
                        resource,
                    )
                )

    def named(self, name: str, trace: str | None = None) -> list[SentSpan]:
        return [span for span in self.spans if span.name == name and trace in (None, span.trace)]

    def wait_for(self, name: str, trace: str, count: int = 1, seconds: float = 30.0) -> list[SentSpan]:
        end = time.monotonic() + seconds
        while len(found := self.named(name, trace)) < count:
            assert time.monotonic() < end, [span.name for span in self.spans if span.trace == trace]
            time.sleep(0.02)
        return found


def value_of(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            found.take(self.path, body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
