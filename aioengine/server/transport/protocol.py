"""uvicorn's HTTP protocol with bounds on what a connection may hold, how long it may take, and how much of
it is worked on at a time."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from aioengine.metrics.page.plumbing import DEPARTURE
from aioengine.server.bounds import Shares, network_of

HEADER_BYTES = 64 * 1024
"""Bound on a request's line and headers, and on all between two parts of a body: extensions, trailers."""
MAX_HEADERS = 256
URL_BYTES = 8 * 1024
SLICE = 16 * 1024
"""Maximum bytes of chunks that the parser gets at a time, because every few of them may be a chunk."""
INPUT_BYTES = 64 * 1024
"""A connection with more unparsed bytes than this is not read from."""
LINGER_SECONDS = 5.0
"""Time for the rest of a refused body."""
UNSENT_BYTES = 64 * 1024
"""Bytes of answers that are kept here for a client, and again in the system, which would take megabytes."""
PER_PASS, PASS_SECONDS = 16, 0.005
"""Bounds on the turns in one pass of the loop."""
PATIENCE = 0.1
"""Seconds of a non-empty queue after which it counts as a flood."""
_END = b"\r\n\r\n"
_OFFER = re.compile(rb"^upgrade(?=:)", re.IGNORECASE | re.MULTILINE)


class Turns:
    """Queue of turns; a connection parses a request or a slice of a body in each. In one pass of the loop, as
    many are taken as ``PER_PASS`` and ``PASS_SECONDS`` allow; the others wait, and their owners have turns
    one after the other. So data that arrives at once, from however many connections, cannot delay the loop's
    other work, and one owner's connections do not delay another's.

    A queue that has not been empty for ``PATIENCE`` seconds is a flood: the loop would never be idle, and the
    thread of the model's steps would wait for the interpreter lock each time that it needs it. Then, while
    ``is_busy()``, each pass is followed by a rest as long as the pass and its answers took, so that half of
    the time remains for the steps.
    """

    def __init__(
        self,
        is_busy: Callable[[], bool],
        loop: asyncio.AbstractEventLoop,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._is_busy, self._loop, self._timer = is_busy, loop, timer
        self._lines: dict[str, deque[Callable[[], None]]] = {}
        """Turns that wait by owner, in the order in which owners have them; none is empty."""
        self._waited_since: float | None = None
        """Time since when the queue has not been empty; None if it is."""

    def ask(self, owner: str, turn: Callable[[], None]) -> None:
        """Call ``turn`` in one of the loop's next passes."""
        self._lines.setdefault(owner, deque()).append(turn)
        if self._waited_since is None:
            self._waited_since = self._timer()
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        began = self._timer()
        self._loop.call_soon(self._end_pass, began)  # when these turns are over, whatever they raise
        for _ in range(PER_PASS):
            if not self._lines or self._timer() - began > PASS_SECONDS:
                break
            owner = next(iter(self._lines))
            line = self._lines.pop(owner)
            take = line.popleft()
            if line:
                self._lines[owner] = line
            take()

    def _end_pass(self, began: float) -> None:
        """Begin the next pass, at once or after a rest."""
        if not self._lines or self._waited_since is None:
            self._waited_since = None
            return
        now = self._timer()
        is_flood = now - self._waited_since > PATIENCE and self._is_busy()
        self._loop.call_later(now - began if is_flood else 0.0, self._pass)


class Limits(NamedTuple):
    """What the connections of one server share. Times are in seconds."""

    connections: Shares
    """The open ones; those that find no room are answered with 503 and closed."""
    turns: Turns
    header_timeout: float
    """From a connection's beginning, or from a request's first byte, to the end of its headers; then the
    connection is closed. Between requests uvicorn's own keep-alive time holds."""
    send_timeout: float
    """After it a client is cut off that leaves unread what is kept for it: 64 KiB, or what is left when the
    connection is closed."""


class BoundedProtocol(HttpToolsProtocol):
    """Protocol that keeps incoming bytes in ``_input``, and gives the parser the head of a request as a
    whole, and then its body in slices that end where the request may end. So a connection has one request at
    a time: the next is parsed in a separate turn, once the first is answered.

    To uvicorn it is the transport as well, so that it decides when the connection closes and pauses."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits, self.turns = limits, limits.turns
        self._has_asked = False
        """Whether it waits for its turn."""
        self._real: asyncio.Transport
        self._input = self._parsed = b""
        """Bytes that are not parsed yet, and the last ones before, in which a request's end may begin."""
        self.counted_as: str | None = None
        """The owner among whose connections it is counted."""
        self.lingers = False
        """Whether the answer has been written and incoming bytes are dropped."""
        self._is_full = self._is_paused = False
        self._in_head = True
        self._unseen = 0
        """Bytes of the body given to the parser since it last said what they are."""
        self._body_left = 0
        """Bytes of the body that are still to come, if its length is known."""
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._gone: asyncio.Future[None] = self.loop.create_future()
        """Done when the client has gone."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        self._real = transport
        transport.set_write_buffer_limits(high=UNSENT_BYTES)  # with TLS it would be 512 KiB
        with contextlib.suppress(AttributeError, OSError):  # not every system has it
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self.get_extra_info = transport.get_extra_info
        super().connection_made(self)  # type: ignore[arg-type] # it has what is used
        if self.counted_as is None and not self.enter(self.owner):
            self._answer(503, b"retry-after: 1\r\n")
            self._end()
        else:
            self._watch(self._limits.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()
        self._stop_watch()
        self.resume_writing()
        self._input = b""
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

    def is_closing(self) -> bool:
        return self.lingers or self._real.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._real.write(data)

    def close(self) -> None:
        """Close the connection, but if the client still sends, not before it can have read the answer:
        closing with unread bytes would make the kernel drop the answer."""
        if self._input or (self.cycle is not None and self.cycle.more_body):
            self._linger()
        else:
            self._end()

    def _linger(self) -> None:
        if self.is_closing() or not self._real.can_write_eof():
            self._end()
            return
        self.lingers = True
        self._input = b""
        self._pace_input()
        self._real.write_eof()
        self._watch(LINGER_SECONDS)

    def _end(self) -> None:
        """Close the connection once its client has read what is kept for it, or after a time."""
        self._real.close()
        if self._real.get_write_buffer_size():
            self._watch(self._limits.send_timeout, self._real.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.send_timeout, self._real.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    # What arrives, and when it is parsed

    def data_received(self, data: bytes) -> None:
        if self.is_closing():
            return
        if self._in_head and not self._input and not self._is_blocked:
            self._expect_head()
        self._input += data
        if self._size_of_part() and not self._is_blocked:
            self._ask()
        elif self._in_head and len(self._input) > HEADER_BYTES and not self._is_blocked:
            self._refuse(431)
        self._pace_input()

    def _ask(self) -> None:
        if not self._has_asked:
            self._has_asked = True
            self.turns.ask(self.owner, self._take_turn)

    def _take_turn(self) -> None:
        """Parse one request, or a part of a body."""
        self._has_asked, left = False, SLICE
        while left > 0 and not self.is_closing() and not self._is_blocked and (size := self._size_of_part()):
            part, self._input = self._input[:size], self._input[size:]
            left -= size
            self._parse(part)
        if self.is_closing():
            self._input = b""
        elif self._size_of_part() and not self._is_blocked:
            self._ask()
        self._pace_input()

    @property
    def _is_blocked(self) -> bool:
        """Whether parsing pauses: the body's reader is behind, or a request is being answered."""
        cycle = self.cycle
        return self._is_full or (cycle is not None and not (cycle.more_body or cycle.response_complete))

    def _size_of_part(self) -> int:
        """Size of what the parser gets next: a whole head, or of a body at most what is left of it; 0 if more
        has to come."""
        if self._in_head:
            return self._input.find(_END) + len(_END) if _END in self._input else 0
        if self._body_left:
            return min(self._body_left, 4 * SLICE, len(self._input))
        found = (self._parsed + self._input[:SLICE]).find(_END)
        return min(SLICE, len(self._input)) if found < 0 else found + len(_END) - len(self._parsed)

    def _parse(self, part: bytes) -> None:
        if self._in_head:  # an offer of another protocol is declined: after it the parser would read no body
            part = _OFFER.sub(b"x-upgrade", part)
        else:
            self._unseen += len(part)
            self._parsed = (self._parsed + part)[-3:]
        if self._unseen > HEADER_BYTES + SLICE or (self._in_head and len(part) > HEADER_BYTES):
            self._refuse(431)
            return
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserError:
            self._refuse(400)

    def pause_reading(self) -> None:
        """Give the parser no more: the body's reader is behind."""
        self._is_full = True

    def resume_reading(self) -> None:
        self._is_full = False
        if self._input:
            self._ask()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._input and not self.is_closing():
            if self._in_head:
                self._expect_head()
            self._ask()

    def _expect_head(self) -> None:
        self._unset_keepalive_if_required()
        self._watch(self._limits.header_timeout)

    def _pace_input(self) -> None:
        """Read no more while too many bytes are not parsed."""
        is_paused = len(self._input) > INPUT_BYTES
        if is_paused != self._is_paused and not self._real.is_closing():
            self._is_paused = is_paused
            if is_paused:
                self._real.pause_reading()
            else:
                self._real.resume_reading()

    # What the parser finds

    def on_message_begin(self) -> None:
        if self._is_blocked:  # the request before ended where no slice was cut
            self._real.close()
        super().on_message_begin()
        self.scope["extensions"] = {DEPARTURE: self._gone}  # type: ignore[dict-item] # for this server's own code

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are no headers: nothing has checked them
            super().on_header(name, value)
            if self.headers[-1][0] == b"transfer-encoding":  # as the parser reads it: uvicorn takes a tab off
                self.headers[-1] = (b"transfer-encoding", value)

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        fault = _fault(version, self.headers)
        if len(self.url) > URL_BYTES:
            fault = 414
        elif len(self.headers) > MAX_HEADERS:
            fault = 431
        elif self.parser.should_upgrade():  # CONNECT
            fault = 400
        if fault is not None:
            self._refuse(fault)
        if self.is_closing():
            return
        self._stop_watch()
        self._in_head, self._unseen, self._parsed = False, 0, b""
        names = dict(self.headers)
        self._body_left = 0 if b"transfer-encoding" in names else int(names.get(b"content-length", 0))
        self.expect_100_continue &= version != "1.0"
        super().on_headers_complete()
        if version == "1.0":
            _end_with_connection(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._body_left = max(self._body_left - len(body), 0)
        self._unseen = 0
        if not self.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.is_closing():
            self._in_head, self._unseen = True, 0
            self.cycle.more_body = False
            super().on_message_complete()

    # Time, and refusals

    def _watch(self, seconds: float, then: Callable[[], None] | None = None) -> None:
        """Close the connection after ``seconds``."""
        self._stop_watch()
        self._timer = self.loop.call_later(seconds, then or self._time_out)

    def _time_out(self) -> None:
        if self._has_asked and not self.is_closing():  # what has come waits for its turn
            self._watch(self._limits.header_timeout)
        else:
            self._end()

    def _stop_watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, status: int) -> None:
        if self.is_closing():
            return
        if not self._in_head and self.cycle.response_started:
            self._end()
        else:
            self._answer(status)
            self._linger()

    def _answer(self, status: int, headers: bytes = b"") -> None:
        headers += b"content-length: 0\r\nconnection: close\r\n\r\n"
        self._real.write(STATUS_LINE[status] + headers)


def _fault(version: str, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return the status with which to refuse a request that a proxy in front might understand
    otherwise (RFC 9112), which uvicorn's parser leaves to others; None if it is good."""
    if version not in ("1.0", "1.1"):
        return 505
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return 400
    codings = b",".join(value for name, value in headers if name == b"transfer-encoding")
    # To the parser a tab is a part of the name; it finds fault with that only when the request has begun.
    named = [coding.strip(b" ") for coding in codings.lower().split(b",")] if codings else []
    if named in ([], [b"chunked"]):
        return None
    return 400 if all(coding in (b"", b"chunked") for coding in named) else 501


def _end_with_connection(cycle: RequestResponseCycle) -> None:
    """Have an answer whose length is not known end with the connection: HTTP/1.0 knows no chunks."""
    send, has_length = cycle.send, False

    async def send_unframed(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_unframed  # type: ignore[method-assign] # only this answer's
