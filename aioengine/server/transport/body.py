"""Bounds on request bodies: size, time to arrive, and memory of all bodies together."""

from __future__ import annotations

import asyncio

from aioengine.metrics.page.plumbing import Message, Receive, Scope
from aioengine.server.bounds import Shares
from aioengine.server.errors import ApiError, ClientDisconnected

MIN_RATE = 16 * 1024
"""Minimum rate of a body in bytes a second, after its first ``timeout`` seconds."""
FREE_BYTES = 64 * 1024
"""Bytes of each body that are not counted, so that small requests are accepted whatever large ones hold."""
RETRY_AFTER = 1


class BoundedBody:
    """An ASGI ``receive`` that raises ApiError when the body is too large (413), too slow (408) or one too
    many (503), and ClientDisconnected if it breaks off."""

    def __init__(
        self,
        receive: Receive,
        scope: Scope,
        shares: Shares,
        owner: str | None,
        *,
        limit: int,
        timeout: float,
    ) -> None:
        self._receive, self._shares, self._owner = receive, shares, owner
        self._limit, self._timeout = limit, timeout
        self._begin = asyncio.get_running_loop().time()
        self._size = self._held = 0
        self._complete = False
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and value.isdigit():
                digits = value.lstrip(b"0")
                if len(digits) > len(str(limit)) or int(digits or b"0") > limit:
                    raise self._too_large()

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        due = self._begin + self._timeout + self._size / MIN_RATE
        try:
            async with asyncio.timeout_at(min(due, now + self._timeout)):
                message = await self._receive()
        except TimeoutError:
            text = (
                f"the body came too slowly: nothing for {self._timeout} seconds, or less than {MIN_RATE} "
                "bytes a second"
            )
            raise ApiError(408, text, code="request_timeout", close=True) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        self._hold(max(self._size - FREE_BYTES, 0) - self._held)
        self._complete = not message.get("more_body", False)
        return message

    async def whole(self) -> bytes:
        """Return the content."""
        message = await self()
        if not message.get("more_body", False):
            return bytes(message["body"])
        parts = [message["body"]]
        try:
            while message.get("more_body", False):
                message = await self()
                parts.append(message["body"])
            return b"".join(parts)
        finally:
            parts.clear()  # an error that is raised refers to this frame, and lives as long as its answer

    def release(self, kept: int = 0) -> None:
        """Release the body's bytes, but ``kept`` of them, which are still in memory; safe to call again."""
        held = min(self._held, max(kept - FREE_BYTES, 0))
        if held < self._held:
            self._shares.give_back(self._owner, self._held - held)
            self._held = held

    def _hold(self, more: int) -> None:
        if more and not self._shares.take(self._owner, more, alone=self._limit):
            raise ApiError(
                503,
                "the server is receiving as many large requests, or as many of yours, as it can; try again "
                "later",
                type="server_error",
                code="overloaded",
                retry_after=RETRY_AFTER,
                close=True,
            )
        self._held += more

    def _too_large(self) -> ApiError:
        text = f"the body is larger than the {self._limit} bytes that are allowed"
        return ApiError(413, text, code="request_too_large")
