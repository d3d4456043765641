"""What every answer is sent through, and work that ends when nobody waits for its answer any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from aioengine.metrics.page.plumbing import PART_BYTES, Message, Scope, Send, in_parts, watch_of
from aioengine.server.access.browsers import BrowserRules
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import Shares, seconds_of
from aioengine.server.errors import ApiError, ClientDisconnected

T = TypeVar("T")


class Sender:
    """An ASGI ``send`` for one request: it adds headers, leaves out the body for HEAD, and sends large
    answers in parts, once they have room among those that are being sent.

    ``retry_after`` estimates when a request that was one too many may come again. A client that does not
    accept a part in ``seconds`` is given up, unless the server watches its clients. Raises ClientDisconnected
    for a client that has gone, and ApiError for an answer that is too large or finds no room: then nothing
    has been sent.
    """

    def __init__(
        self,
        send: Send,
        scope: Scope,
        record: RequestRecord,
        unread: Shares,
        browsers: BrowserRules,
        retry_after: Callable[[RequestRecord], int],
        *,
        seconds: float,
    ) -> None:
        self.started = False
        self._send, self._scope, self._record = send, scope, record
        self._unread, self._browsers, self._retry_after = unread, browsers, retry_after
        self._seconds = None if watch_of(scope) else seconds
        self._held = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._hold(message["headers"])
            self.started = True
            self._record.status = message["status"]
            message = {**message, "headers": self._headers(message["headers"])}
        elif self._scope["method"] == "HEAD":
            message = {**message, "body": b""}
        try:
            for part in in_parts(message):
                if self._seconds is None:
                    await self._send(part)
                else:
                    async with asyncio.timeout(self._seconds):
                        await self._send(part)
        except OSError as error:  # it went away in the middle of a message; TimeoutError is one
            raise ClientDisconnected from error

    def close(self) -> None:
        """Count the answer no longer."""
        if self._held:
            self._unread.give_back(self._record.owner, self._held)

    async def _hold(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        size = next((int(value) for name, value in headers if name == b"content-length"), 0)
        owner, most = self._record.owner, self._unread.most
        if size <= PART_BYTES:
            return
        if size > most:
            text = f"the answer has {size} bytes, and may have {most}: ask for fewer log-probabilities, "
            raise ApiError(400, f"{text}choices or tokens, or for a stream", code="answer_too_large")
        if not await self._unread.take_soon(owner, size, seconds_of("room for a large answer"), alone=size):
            why = "of others wait to be read, and leave no room for this one; try again later"
            if self._unread.has(owner):
                why = "of yours wait to be read, and have as many bytes as they may; read them first"
            raise ApiError(503, f"answers {why}", code="overloaded", retry_after=1)
        self._held = size

    def _headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        record = self._record
        found = [*headers, (b"x-request-id", record.request_id.encode())]
        if record.error in ("engine_overloaded", "request_rejected"):
            found = [header for header in found if header[0] != b"retry-after"]
            found.append((b"retry-after", str(self._retry_after(record)).encode()))
        if record.not_enforced is not None:
            found.append((b"x-not-enforced", record.not_enforced.encode("ascii", "replace")))
        # A client that asks first and is refused sends no body: its next request could be mistaken for it.
        if record.status >= 400 and any(name == b"expect" for name, _ in self._scope["headers"]):
            found.append((b"connection", b"close"))
        return found + self._browsers.permission(self._scope)


async def unless(
    work: Coroutine[Any, Any, T],
    gone: asyncio.Future[None] | None,
    ended: asyncio.Future[ApiError] | None,
) -> T:
    """Return the result of ``work``, unless the client is ``gone`` or ``ended`` is done first: then ``work``
    is cancelled, and ClientDisconnected or the error that ended it is raised."""
    task = asyncio.current_task()
    assert task is not None
    if gone is not None and gone.done():
        work.close()
        raise ClientDisconnected
    cancels = task.cancelling()
    why: list[BaseException] = []

    def end(first: asyncio.Future[Any]) -> None:
        if not why and not first.cancelled():
            why.append(first.exception() or first.result() or ClientDisconnected())
            task.cancel()  # as asyncio.timeout does, so that the work needs no task of its own

    watched = [future for future in (gone, ended) if future is not None]
    for future in watched:
        future.add_done_callback(end)
    try:
        return await work
    except asyncio.CancelledError:
        if why and task.uncancel() <= cancels:
            raise why[0] from None
        raise
    finally:
        for future in watched:
            future.remove_done_callback(end)
