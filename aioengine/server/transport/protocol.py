"""uvicorn's HTTP protocol with bounds on what a connection may hold, how long it may take, and how much of
it is worked on at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aioengine.metrics.page.plumbing import DEPARTURE, WATCH
from aioengine.server.bounds import CONNECTIONS, INPUT, Shares, network_of, seconds_of
from aioengine.server.transport.heads import body_parser, end_with_connection, find_fault, framing
from aioengine.server.transport.reader_watch import ReaderWatch, unread_bytes
from aioengine.server.transport.turns import Turns

HEADER_BYTES = 64 * 1024
"""Bound on a request's line and headers."""
MAX_HEADERS = 256
URL_BYTES = 8 * 1024
SLICE = 16 * 1024
"""Maximum bytes that the parser gets at a time, because every few of them may be a header or a chunk."""
UNSEEN_BYTES = HEADER_BYTES + URL_BYTES + SLICE
"""Bound on a part of a request that the parser has not reported yet: a header, a trailer, an extension."""
INPUT_BYTES = 64 * 1024
"""A connection with more unparsed bytes than this is not read from."""
LEFT_BYTES = 64 * 2**20
"""Bytes of a refused body that are read and dropped, so that a client that sends it to the end before it
reads still gets its answer; beyond it the connection is closed."""
LATE_SECONDS = 1.0
"""Time that a connection gets, again and again, while what its client has sent in time is not parsed yet."""


class Limits:
    """What the connections of one server share.

    Args:
        max_connections: Maximum open connections, of which one address may have a part; further ones are
            answered with 503 and closed.
        header_timeout: Seconds from a connection's beginning, or from a request's first byte, to the end
            of its headers; then the connection is closed. Between requests uvicorn's own keep-alive
            time holds.
        is_busy: Whether requests are open whose steps a flood of small requests must not slow down.
    """

    def __init__(self, max_connections: int, header_timeout: float, is_busy: Callable[[], bool]) -> None:
        self.connections = Shares(CONNECTIONS._replace(most=max_connections))
        self.input = Shares(INPUT)
        self.turns = Turns(is_busy)
        self.header_timeout = header_timeout


class BoundedProtocol(HttpToolsProtocol):
    """Protocol that keeps incoming bytes in ``_input`` and gives them to the parser in slices that end where
    a request may end. So a connection has one request at a time: the next is parsed in a separate turn, once
    the first is answered."""

    reader: ReaderWatch

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits, self.turns = limits, limits.turns
        self.has_asked = False
        self._real: asyncio.Transport
        self._input = b""
        self._at = 0
        """Number of bytes of ``_input`` that were parsed; the last ones are kept, because the end of a
        request may begin in them."""
        self._held = 0
        """Bytes that are counted for this connection."""
        self.counted_as: str | None = None
        """The owner among whose connections it is counted."""
        self.lingers = False
        """Whether the answer has been written and incoming bytes are dropped."""
        self._is_full = self._is_paused = False
        self._header_bytes = self._header_count = self._left_bytes = 0
        self._has_headers = False
        """Whether the headers of the request that is being parsed are complete."""
        self._unseen = 0
        """Bytes given to the parser since it last said what they are. It keeps a header until its end, and
        copies it with each slice."""
        self._body_left = 0
        """Bytes of the body that are still to come, if its length is known."""
        self._timer: asyncio.TimerHandle | None = None
        self._gone: asyncio.Future[None] = self.loop.create_future()
        """Done when the client has gone."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        self._real = transport
        self.reader = ReaderWatch(transport, self.loop)
        super().connection_made(AnswerTransport(transport, self))  # type: ignore[arg-type] # it has what is used
        if self.counted_as is None and not self.enter(self.owner):
            self._answer(503, b"Service Unavailable", b"retry-after: 1\r\n")
            self._real.close()
        else:
            self._watch(self._limits.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()
        self._stop_watch()
        self.reader.close()
        self._drop_input()
        super().connection_lost(exc)
        self._gone.set_result(None)

    def enter(self, owner: str) -> bool:
        """Count the connection, if there is room for it; returns whether there is. Called by whoever has
        accepted it, if that is before :meth:`connection_made`."""
        if not self._limits.connections.take(owner, 1):
            return False
        self.counted_as = owner
        return True

    def leave(self) -> None:
        """Count the connection no longer; safe to call again."""
        if self.counted_as is not None:
            self._limits.connections.give_back(self.counted_as, 1)
            self.counted_as = None

    @property
    def owner(self) -> str:
        return network_of(self.client[0]) if self.client else ""

    @property
    def is_closing(self) -> bool:
        return self.lingers or self._real.is_closing()

    def close(self) -> None:
        """Close the connection, but if the client still sends, not before it can have read the answer:
        closing with unread bytes would make the kernel drop the answer."""
        if self._left or (self.cycle is not None and self.cycle.more_body):
            self._linger()
        else:
            self._real.close()

    def _linger(self) -> None:
        if self.is_closing or not self._real.can_write_eof():
            self._real.close()
            return
        self.lingers = True
        self._drop_input()
        self._real.write_eof()
        self._watch(seconds_of("the rest of a refused body"))

    # What arrives, and when it is parsed

    @property
    def _left(self) -> int:
        """Number of unparsed bytes."""
        return len(self._input) - self._at

    def data_received(self, data: bytes) -> None:
        if self.lingers:
            self._left_bytes += len(data)
            if self._left_bytes > LEFT_BYTES:
                self._real.abort()
        elif not self._real.is_closing():
            parsed = max(self._at - 3, 0)
            self._input = self._input[parsed:] + data
            self._at -= parsed
            if not self._is_blocked:
                self.turns.ask(self)
            self._count_input()

    def take_turn(self) -> None:
        end = self._at + SLICE
        while self._left and self._at < end and not self.is_closing and not self._is_blocked:
            size = self._size_of_part()
            part = self._input[self._at : self._at + size]
            self._at += size
            self._parse(part)
        if self.is_closing:
            self._drop_input()
        elif not self._left:
            self._input = self._input[-3:]
            self._at = len(self._input)
        elif not self._is_blocked:
            self.turns.ask_later(self)
        self._count_input()

    @property
    def _is_blocked(self) -> bool:
        """Whether parsing pauses: the body's reader is behind, or a request is being answered."""
        cycle = self.cycle
        return self._is_full or (cycle is not None and not (cycle.more_body or cycle.response_complete))

    def _size_of_part(self) -> int:
        """Size of the next slice for the parser, which holds the end of one request at most."""
        if self._body_left:
            return min(self._body_left, 4 * SLICE, self._left)
        found = self._input.find(b"\r\n\r\n", max(self._at - 3, 0), self._at + SLICE)
        return min(SLICE, self._left) if found < 0 else found + 4 - self._at

    def _parse(self, part: bytes) -> None:
        self._unseen += len(part)
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade as upgrade:
            self.parser = body_parser(self)
            self._parse(framing(self.headers) + part[upgrade.args[0] :])
        except httptools.HttpParserError:
            if not self.is_closing:
                self.send_400_response("Invalid HTTP request received.")
        if self._unseen > UNSEEN_BYTES:
            self._refuse(431, b"Request Header Fields Too Large")

    def hold(self, is_full: bool) -> None:
        """Whether the body's reader is behind."""
        self._is_full = is_full
        if not is_full and self._left:
            self.turns.ask_later(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._left and not self.is_closing:
            self.turns.ask_later(self)

    def _count_input(self) -> None:
        """Count the unparsed bytes, and read no more while there are too many."""
        left = self._left
        more = left - self._held
        if more > 0 and not self._limits.input.take(self.owner, more):
            self._drop_input()
            self._real.abort()
            return
        if more < 0:
            self._limits.input.give_back(self.owner, -more)
        self._held = left
        is_paused = left > INPUT_BYTES
        if is_paused != self._is_paused and not self._real.is_closing():
            self._is_paused = is_paused
            if is_paused:
                self._real.pause_reading()
            else:
                self._real.resume_reading()

    def _drop_input(self) -> None:
        self._input, self._at = b"", 0
        self._count_input()

    # What the parser finds

    def on_message_begin(self) -> None:
        if self._is_blocked:  # the request before ended where no slice was cut
            self._real.close()
        self._unset_keepalive_if_required()
        self._header_bytes = self._header_count = self._left_bytes = self._body_left = 0
        self._has_headers, self._unseen = False, 0
        self._watch(self._limits.header_timeout)
        super().on_message_begin()
        self.scope["extensions"] = {WATCH: self.reader, DEPARTURE: self._gone}  # type: ignore[dict-item] # for this server's own code

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > URL_BYTES:
            self._refuse(414, b"URI Too Long")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_headers:  # trailers are no headers: nothing has checked them
            super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        self._header_count += 1
        if self._header_bytes > HEADER_BYTES or self._header_count > MAX_HEADERS:
            self._refuse(431, b"Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        self._stop_watch()
        version = self.parser.get_http_version()
        fault = find_fault(version, self.headers)
        if fault is not None:
            self._refuse(*fault)
        self._has_headers, self._unseen = True, 0
        if self.is_closing:
            return
        names = dict(self.headers)
        if b"transfer-encoding" not in names:
            self._body_left = int(names.get(b"content-length", 0))
        super().on_headers_complete()
        if version == "1.0":
            end_with_connection(self.cycle)
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._body_left = max(self._body_left - len(body), 0)
        self._unseen = 0
        if self.is_closing:
            return
        if self.cycle.response_complete:  # refused before it was read
            self._left_bytes += len(body)
            if self._left_bytes > LEFT_BYTES:
                self._real.close()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # it means the headers; another one reads the body
        if not self.is_closing:
            self.cycle.more_body = False
            super().on_message_complete()

    # Time, and refusals

    def _watch(self, seconds: float) -> None:
        """Close the connection after ``seconds``."""
        self._stop_watch()
        self._timer = self.loop.call_later(seconds, self._time_out)

    def _time_out(self) -> None:
        if self._is_late and not self.is_closing:
            self._watch(LATE_SECONDS)
        else:
            self._real.close()

    def timeout_keep_alive_handler(self) -> None:
        if self._is_late:  # it would lose a request
            self.timeout_keep_alive_task = self.loop.call_later(LATE_SECONDS, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    @property
    def _is_late(self) -> bool:
        """Whether the client has sent something that this process has not looked at yet. A busy loop runs
        timers before it reads, so that the client may have kept to the time."""
        return bool(self._left) or unread_bytes(self._real.get_extra_info("socket")) > 0

    def _stop_watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, phrase: bytes) -> None:
        if self.is_closing:
            return
        if self._has_headers and self.cycle.response_started:
            self._real.close()
        else:
            self._answer(status, phrase)
            self._linger()

    def _answer(self, status: int, phrase: bytes, headers: bytes = b"") -> None:
        head = b"HTTP/1.1 %d %s\r\ncontent-length: 0\r\nconnection: close\r\n" % (status, phrase)
        self._real.write(head + headers + b"\r\n")


class AnswerTransport:
    """The transport as uvicorn sees it; the protocol decides when it closes and pauses."""

    def __init__(self, transport: asyncio.Transport, protocol: BoundedProtocol) -> None:
        self._protocol, self._real = protocol, transport
        self.get_extra_info = transport.get_extra_info
        self._head = b""
        self._head_of: object = None
        """The cycle whose answer has begun."""

    def write(self, data: bytes) -> None:
        """Write it; the headers of an answer together with what follows in the same pass of the loop."""
        protocol, cycle = self._protocol, self._protocol.cycle
        if protocol.is_closing:
            return
        if cycle is not self._head_of and cycle is not None and cycle.response_started:
            self._head_of, self._head = cycle, data
            protocol.loop.call_soon(self.flush)
        else:
            head, self._head = self._head, b""
            self._write(head + data)

    def flush(self) -> None:
        """Write headers that nothing has followed."""
        if self._head and not self._protocol.is_closing:
            self._write(self._head)
        self._head = b""

    def _write(self, data: bytes) -> None:
        self._real.write(data)
        self._protocol.reader.wrote(len(data))

    def is_closing(self) -> bool:
        return self._protocol.is_closing

    def close(self) -> None:
        self.flush()
        self._protocol.close()

    def pause_reading(self) -> None:
        self._protocol.hold(True)

    def resume_reading(self) -> None:
        self._protocol.hold(False)
