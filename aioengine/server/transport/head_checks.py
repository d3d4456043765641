"""Checks of a request's head that the parser does not make: those of RFC 9112 on versions, hosts and transfer
codings. A proxy in front might understand such a request otherwise."""

from __future__ import annotations

from collections.abc import Iterable

_BAD_REQUEST = (400, b"Bad Request")


def find_fault(version: str, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, bytes] | None:
    """Return the status and its phrase with which to refuse a request; None if it is good. Names of
    ``headers`` are in lower case."""
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
