"""Bounds on request bodies: size, time to arrive, and memory of all bodies together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, MutableMapping
from typing import Any

from aioengine.metrics.page.plumbing import Receive
from aioengine.server.errors import ApiError, ClientDisconnected

MIN_RATE = 16 * 1024
"""Minimum rate of a body in bytes a second, after its first ``timeout`` seconds."""
FREE_BYTES = 64 * 1024
"""Bytes of each body that are not counted, so that small requests are accepted whatever large ones hold."""
BUDGET_BODIES = 32
"""The budget of all bodies together, in bodies of the largest size. One client's may hold half of what others
leave, or one of the largest size, so that a few clients cannot take it all."""
RETRY_AFTER = 1


class BodyBudget:
    """Bytes held by bodies that are being received, or processed before their answer begins."""

    def __init__(self, bodies: int | None = None) -> None:
        self._bodies = BUDGET_BODIES if bodies is None else bodies
        self.held = 0
        self._of: Counter[str | None] = Counter()

    def hold(self, owner: str | None, more: int, *, largest: int) -> str | None:
        """Count ``more`` bytes as held by ``owner``; a body has at most ``largest`` bytes. Returns the reason
        if there is no room."""
        if not more:
            return None
        most, own = self._bodies * largest, self._of[owner]
        if more > 0 and self.held + more > most:
            return "the server is receiving as many large requests as it can"
        if more > 0 and own + more > max(largest, (most - (self.held - own)) // 2):
            return "the server is receiving as many large requests of yours as it can"
        self.held += more
        self._of[owner] += more
        if not self._of[owner]:
            del self._of[owner]
        return None


class BoundedBody:
    """An ASGI ``receive`` that raises ApiError when the body is too large (413), too slow (408) or one too
    many (503), and ClientDisconnected if it breaks off."""

    def __init__(
        self,
        receive: Receive,
        headers: Iterable[tuple[bytes, bytes]],
        budget: BodyBudget,
        *,
        owner: str | None,
        limit: int,
        timeout: float,
    ) -> None:
        self._receive = receive
        self._budget = budget
        self._owner = owner
        self._limit = limit
        self._timeout = timeout
        self._begin = asyncio.get_running_loop().time()
        self._size = self._held = 0
        self._complete = False
        for name, value in headers:
            if name.lower() == b"content-length" and value.isdigit():
                digits = value.lstrip(b"0")
                if len(digits) > len(str(limit)) or int(digits or b"0") > limit:
                    raise self._too_large()

    async def __call__(self) -> MutableMapping[str, Any]:
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
        self._hold()
        self._complete = not message.get("more_body", False)
        return message

    def release(self, kept: int = 0) -> None:
        """Release the body's bytes, but ``kept`` of them, which are still in memory; safe to call again."""
        held = min(self._held, max(kept - FREE_BYTES, 0))
        self._budget.hold(self._owner, held - self._held, largest=self._limit)
        self._held = held

    def _hold(self) -> None:
        more = max(self._size - FREE_BYTES, 0) - self._held
        why = self._budget.hold(self._owner, more, largest=self._limit)
        if why is not None:
            raise ApiError(
                503,
                f"{why}; try again later",
                type="server_error",
                code="overloaded",
                retry_after=RETRY_AFTER,
                close=True,
            )
        self._held += more

    def _too_large(self) -> ApiError:
        text = f"the body is larger than the {self._limit} bytes that are allowed"
        return ApiError(413, text, code="request_too_large")
