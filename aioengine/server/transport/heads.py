"""What uvicorn's parser leaves to others about a request's head: checks of RFC 9112, offers of other
protocols, and clients of HTTP/1.0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_BAD_REQUEST = (400, b"Bad Request")
_FRAMING = (b"content-length", b"transfer-encoding")


def find_fault(version: str, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, bytes] | None:
    """Return the status and its phrase with which to refuse a request that a proxy in front might understand
    otherwise; None if it is good. Names of ``headers`` are in lower case."""
    if version not in ("1.0", "1.1"):
        return 505, b"HTTP Version Not Supported"
    hosts, codings = 0, b""
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            codings += value + b","
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return _BAD_REQUEST
    if not codings:
        return None
    # To the parser a tab is a part of the name; it finds fault with that only when the request has begun.
    named = [coding.strip(b" ") for coding in codings[:-1].lower().split(b",")]
    if named == [b"chunked"]:
        return None
    is_known = all(coding in (b"", b"chunked") for coding in named)
    return _BAD_REQUEST if is_known else (501, b"Not Implemented")


# An offer of another protocol, as Java's client makes it of HTTP/2 with each request and browsers of
# WebSockets, is declined: the request is answered like any other. But the parser leaves its body alone,
# because what follows could be in the other protocol, and so a second parser reads it.


class _Body:
    """What a parser reports of a body to ``protocol``."""

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self.on_header = protocol.on_header  # of trailers
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete


def body_parser(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    """Return a parser that is to be fed :func:`framing`, and then the body."""
    return httptools.HttpRequestParser(_Body(protocol))


def framing(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the head of a request without an offer whose body ends where that of ``headers`` does."""
    kept = (b"%b: %b\r\n" % (name, value) for name, value in headers if name in _FRAMING)
    return b"POST / HTTP/1.1\r\n%bconnection: close\r\n\r\n" % b"".join(kept)


def end_with_connection(cycle: RequestResponseCycle) -> None:
    """Have an answer whose length is not known end with the connection: HTTP/1.0 knows no chunks. Nor does it
    know an interim answer, so none is given to an ``Expect``."""
    cycle.waiting_for_100_continue = False
    send = cycle.send
    has_length = False

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
