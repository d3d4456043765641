"""Metrics over HTTP, from a separate thread, for applications without a web server."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from aioengine.metrics.combined import HasMetrics

Expose = Callable[[str], tuple[bytes, str]]
"""Function from an ``Accept`` header to the text and its content type."""


class MetricsServer(ThreadingHTTPServer):
    """Serves ``GET /metrics`` until it is closed. ``port`` is the real one, also where 0 was asked for."""

    daemon_threads = True

    def __init__(self, expose: Expose, port: int, addr: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        self.expose = expose
        super().__init__((addr, port), _Handler)
        self.port: int = self.server_address[1]
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.05,), name="aioengine-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port; may be called more than once."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
        self.server_close()

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = 10  # seconds that a client may take to send its request

    def do_GET(self) -> None:
        if self.path.split("?", 1)[0] not in ("/metrics", "/"):
            self._answer(404, b"not found; the metrics are at /metrics\n")
            return
        try:
            text, content_type = self.server.expose(self.headers.get("Accept", ""))
        except TimeoutError as error:
            self._answer(503, f"{error}\n".encode())
            return
        compress = gzip_accepted(self.headers.get("Accept-Encoding", ""))
        self._answer(200, gzip.compress(text, 1) if compress else text, content_type, compressed=compress)

    do_HEAD = do_GET

    def _answer(
        self,
        status: int,
        body: bytes,
        content_type: str = "text/plain; charset=utf-8",
        *,
        compressed: bool = False,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Vary", "Accept, Accept-Encoding")
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: scrapes are too frequent."""


def serve_metrics(
    source: HasMetrics | CollectorRegistry, port: int, addr: str = "127.0.0.1"
) -> MetricsServer:
    """Serve an engine's metrics, or a registry, at ``http://addr:port/metrics``.

    >>> with serve_metrics(engine, 9464):
    ...     await engine.complete("Hello")

    Prometheus' text format, or OpenMetrics if the scraper asks for it, which adds the exemplars. A
    scrape takes a snapshot on the engine's event loop and does the rest in the server's thread; if the
    loop does not answer within 5 s the scrape fails with 503.

    Raises OSError if the port is not available.
    """

    def expose(accept: str) -> tuple[bytes, str]:
        if not isinstance(source, CollectorRegistry):
            return source.metrics.expose(accept)
        encode, content_type = choose_encoder(accept)
        return encode(source), content_type

    return MetricsServer(expose, port, addr)
