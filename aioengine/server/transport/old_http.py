"""Answers to clients that speak HTTP/1.0."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


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
