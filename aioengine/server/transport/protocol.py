"""uvicorn's HTTP protocol with bounds on what a connection may hold and how long it may take."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_BYTES = 64 * 1024
"""Bound on a request's line and headers."""
LEFT_BYTES = 64 * 2**20
"""So much of a body that was refused is thrown away, so that a client which sends it to its end before it
reads gets its answer; beyond it the connection is closed."""


def bounded_protocol(max_connections: int, header_timeout: float) -> type[asyncio.Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)``.

    Args:
        max_connections: Beyond so many open ones, new connections are answered with 503 and closed.
        header_timeout: Seconds from a connection's beginning, or from a request's first byte, to the end
            of its headers; then the connection is closed. Between requests uvicorn's own keep-alive
            time holds.
    """

    class BoundedProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._header_bytes = self._left_bytes = 0
            self._header_timer: asyncio.TimerHandle | None = None
            self._upgrade_left: int | None = None
            """Bytes of the body that are to come, once the client has asked for another protocol."""
            self._earlier: list[Any] = []
            """Requests that are being answered, or are to be, before ``self.cycle``, the last one."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refuse(503, b"Service Unavailable", b"retry-after: 1\r\n")
            else:
                self._watch_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watch()
            for cycle in self._earlier:  # uvicorn tells the last one only
                if not cycle.response_complete:
                    cycle.disconnected = True
                    cycle.message_event.set()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._upgrade_left is not None:
                self._body_after_upgrade(data)
                return
            self._unset_keepalive_if_required()
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # Java's client, for one, offers HTTP/2 so with each request. The offer is declined by
                # answering it as any other request, but the parser leaves the body to us.
                self._body_after_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")

        def _body_after_upgrade(self, data: bytes) -> None:
            """The rest of the last request that this connection takes."""
            assert self._upgrade_left is not None
            if self._upgrade_left > 0:
                body = data[: self._upgrade_left]
                self._upgrade_left -= len(body)
                self.on_body(body)
                if self._upgrade_left == 0:
                    super().on_message_complete()

        def on_message_begin(self) -> None:
            self._header_bytes = self._left_bytes = 0
            self._watch_headers()
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value))
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._stop_watch()
            if self.transport.is_closing():
                return
            before = self.cycle
            super().on_headers_complete()
            if before is None or before.response_complete:
                self._earlier.clear()
            elif before is not self.cycle:
                self._earlier.append(before)
            if self.parser.should_upgrade():
                self.cycle.keep_alive = False
                lengths = [value for name, value in self.headers if name == b"content-length"]
                self._upgrade_left = int(lengths[0]) if lengths else 0

        def on_body(self, body: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.cycle.response_complete:  # refused before it was read
                self._left_bytes += len(body)
                if self._left_bytes > LEFT_BYTES:
                    self.transport.close()
            else:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self._upgrade_left:
                return  # the parser means the headers
            if not self.transport.is_closing():
                super().on_message_complete()

        def _count(self, size: int) -> None:
            self._header_bytes += size
            if self._header_bytes > HEADER_BYTES and not self.transport.is_closing():
                self._refuse(431, b"Request Header Fields Too Large")

        def _watch_headers(self) -> None:
            self._stop_watch()
            self._header_timer = self.loop.call_later(header_timeout, self.transport.close)

        def _stop_watch(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _refuse(self, status: int, phrase: bytes, headers: bytes = b"") -> None:
            head = b"HTTP/1.1 %d %s\r\ncontent-length: 0\r\nconnection: close\r\n" % (status, phrase)
            self.transport.write(head + headers + b"\r\n")
            self.transport.close()

    return BoundedProtocol
