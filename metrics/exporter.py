"""Metrics over HTTP, from a separate thread, for applications without a web server."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from aioengine.metrics.combined import HasMetrics

Expose = Callable[[str], tuple[bytes, str]]
"""Function from an ``Accept`` header to the text and its content type."""


class MetricsServer:
    """Serves ``GET /metrics`` until it is closed. ``port`` is the real one, also where 0 was asked for."""

    def __init__(self, expose: Expose, port: int, addr: str) -> None:
        self._server = _server_class(addr)((addr, port), _handler_class(expose))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="aioengine-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port; may be called more than once."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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
    if isinstance(source, CollectorRegistry):
        return MetricsServer(_of_registry(source), port, addr)
    return MetricsServer(source.metrics.expose, port, addr)


def _of_registry(registry: CollectorRegistry) -> Expose:
    def expose(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return expose


def _server_class(addr: str) -> type[ThreadingHTTPServer]:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        daemon_threads = True

    return Server


def _handler_class(expose: Expose) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds that a client may take to send its request

        def do_GET(self) -> None:
            path = self.path.split("?", 1)[0]
            if path not in ("/metrics", "/"):
                self._answer(404, b"not found; the metrics are at /metrics\n")
                return
            try:
                text, content_type = expose(self.headers.get("Accept", ""))
            except TimeoutError as error:
                self._answer(503, f"{error}\n".encode())
                return
            if gzip_accepted(self.headers.get("Accept-Encoding", "")):
                self._answer(200, gzip.compress(text, 1), content_type, encoding="gzip")
            else:
                self._answer(200, text, content_type)

        do_HEAD = do_GET

        def _answer(
            self,
            status: int,
            body: bytes,
            content_type: str = "text/plain; charset=utf-8",
            encoding: str | None = None,
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Vary", "Accept, Accept-Encoding")
            if encoding is not None:
                self.send_header("Content-Encoding", encoding)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: scrapes are too frequent."""

    return Handler
