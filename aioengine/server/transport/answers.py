"""Answers that their clients have not read yet: sent in parts, and bounded in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from aioengine.metrics.page.plumbing import Message, Send
from aioengine.server.errors import ApiError

PART_BYTES = 64 * 1024
"""Largest part of an answer. The next one is sent when the client has taken most of those before. An answer
that is not larger does not count."""
UNREAD_BYTES = 256 * 2**20
"""Bound on the bytes of all larger answers that are being sent. One client's may have half of what others
leave, or be a single answer."""
RETRY_AFTER = 1


class UnreadAnswers:
    """Bytes of the answers that are being sent, by owner."""

    def __init__(self) -> None:
        self._of: Counter[str | None] = Counter()
        self._all = 0

    def hold(self, owner: str | None, size: int) -> None:
        """Count an answer. Raises ApiError if there is no room."""
        own = self._of[owner]
        if own and own + size > (UNREAD_BYTES - (self._all - own)) // 2:
            raise ApiError(
                503,
                "answers of yours wait to be read, and have as many bytes as they may; read them first",
                type="server_error",
                code="overloaded",
                retry_after=RETRY_AFTER,
            )
        self._of[owner] += size
        self._all += size

    def release(self, owner: str | None, size: int) -> None:
        """Count an answer no longer."""
        self._all -= size
        self._of[owner] -= size
        if not self._of[owner]:
            del self._of[owner]


def size_of(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the length that an answer's headers give, if it is large; else 0."""
    size = next((int(value) for name, value in headers if name == b"content-length"), 0)
    return size if size > PART_BYTES else 0


async def send_in_parts(send: Send, message: Message) -> None:
    """Send a body, waiting for the client between its parts."""
    body, has_more = message["body"], message.get("more_body", False)
    for begin in range(0, len(body), PART_BYTES):
        end = begin + PART_BYTES
        await send({**message, "body": body[begin:end], "more_body": has_more or end < len(body)})
