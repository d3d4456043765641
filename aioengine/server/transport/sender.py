"""What every answer is sent through, and work that ends when nobody waits for its answer any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from aioengine.metrics.page.plumbing import PART_BYTES, Message, Scope, Send, in_parts
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import Shares
from aioengine.server.errors import ApiError, ClientDisconnected

T = TypeVar("T")


class Sender:
    """An ASGI ``send`` for one request: it adds headers, leaves out the body for HEAD, and sends large
    answers in parts, if there is room for them among those that are being sent.

    Raises ClientDisconnected for a client that has gone, and ApiError for an answer that is too large or
    finds no room: then nothing has been sent.
    """

    def __init__(self, send: Send, scope: Scope, record: RequestRecord, unread: Shares) -> None:
        self.started = False
        self._send, self._scope, self._record = send, scope, record
        self._unread, self._held = unread, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._hold(message["headers"])
            self.started = True
            self._record.status = message["status"]
            message = {**message, "headers": self._headers(message["headers"])}
        elif self._scope["method"] == "HEAD":
            message = {**message, "body": b""}
        try:
            for part in in_parts(message):
                await self._send(part)
        except OSError as error:  # it went away in the middle of a message
            raise ClientDisconnected from error

    def close(self) -> None:
        """Count the answer no longer."""
        if self._held:
            self._unread.give_back(self._record.owner, self._held)

    def _hold(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        size = next((int(value) for name, value in headers if name == b"content-length"), 0)
        if size <= PART_BYTES:
            return
        if size > self._unread.most:
            text = f"the answer has {size} bytes, and may have {self._unread.most}: ask for fewer "
            text += "log-probabilities, choices or tokens, or for a stream"
            raise ApiError(400, text, code="answer_too_large")
        if not self._unread.take(self._record.owner, size, alone=size):
            text = "answers of yours, or of others, wait to be read, and leave no room for this one"
            raise ApiError(503, f"{text}; try again later", code="overloaded", retry_after=1)
        self._held = size

    def _headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        record = self._record
        found = [*headers, (b"x-request-id", record.request_id.encode())]
        if record.not_enforced is not None:
            found.append((b"x-not-enforced", record.not_enforced.encode("ascii", "replace")))
        # A client that asks first and is refused sends no body: its next request could be mistaken for it.
        if record.status >= 400 and any(name == b"expect" for name, _ in self._scope["headers"]):
            found.append((b"connection", b"close"))
        return found


async def unless(work: Coroutine[Any, Any, T], gone: asyncio.Future[None]) -> T:
    """Return the result of ``work``, unless the client is ``gone`` first: then ``work`` is cancelled, and
    ClientDisconnected is raised."""
    limit = asyncio.timeout(None)  # so that the work needs no task of its own

    def end(_: asyncio.Future[None]) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended in the same pass of the loop
            limit.reschedule(0)

    gone.add_done_callback(end)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise ClientDisconnected from None
        raise
    finally:
        gone.remove_done_callback(end)
