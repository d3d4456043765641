"""Bounds on a request's body: how large it is, and how long it takes to come."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, MutableMapping
from typing import Any

from aioengine.server.errors import ApiError, ClientDisconnected
from aioengine.server.generation import Receive


class BoundedBody:
    """An ASGI ``receive`` that raises ApiError (413, 408) when the body is too large or too slow, and
    ClientDisconnected if it breaks off."""

    def __init__(
        self, receive: Receive, headers: Iterable[tuple[bytes, bytes]], *, limit: int, timeout: float
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._timeout = timeout
        self._size = 0
        self._complete = False
        for name, value in headers:
            if name.lower() == b"content-length" and value.isdigit():
                digits = value.lstrip(b"0")
                if len(digits) > len(str(limit)) or int(digits or b"0") > limit:
                    raise self._too_large()

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._timeout):
                message = await self._receive()
        except TimeoutError:
            text = f"the body did not come: nothing for {self._timeout} seconds"
            raise ApiError(408, text, code="request_timeout", close=True) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        self._complete = not message.get("more_body", False)
        return message

    def _too_large(self) -> ApiError:
        text = f"the body is larger than the {self._limit} bytes that are allowed"
        return ApiError(413, text, code="request_too_large")
