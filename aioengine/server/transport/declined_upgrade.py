"""Requests that offer another protocol, as Java's client offers HTTP/2 with each request and browsers offer
WebSockets. The offer is declined: the request is answered like any other. But the parser leaves its body
alone, because what follows could be in the other protocol, and so a second parser reads it."""

from __future__ import annotations

from collections.abc import Iterable

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_FRAMING = (b"content-length", b"transfer-encoding")


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
