"""A bound on the memory of answers that their clients have not read yet."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from aioengine.metrics.page.plumbing import PART_BYTES
from aioengine.server.errors import ApiError

UNREAD_BYTES = 256 * 2**20
"""Bound on the bytes of all answers that are being sent and are larger than a part. One client's may have
half of what the others leave, or be a single one that has more of it. Those that wait for room have a bound
of this size, too."""
ROOM_SECONDS = 5.0
"""How long an answer waits for room."""
RETRY_AFTER = 1


class UnreadAnswers:
    """Bytes of the answers that are being sent, by owner."""

    def __init__(self) -> None:
        self._of: Counter[str | None] = Counter()
        self._all = self._waiting = 0
        self._released = asyncio.Event()
        """Set when bytes are released, and then replaced."""

    async def hold(self, owner: str | None, size: int) -> None:
        """Count an answer, once there is room.

        Raises ApiError if there is none in ``ROOM_SECONDS``, if too many answers wait for it, or if the
        answer is larger than all may be."""
        if size > UNREAD_BYTES:
            raise ApiError(
                400,
                f"the answer has {size} bytes, and may have {UNREAD_BYTES}: ask for fewer log-probabilities, "
                "choices or tokens, or for a stream",
                code="answer_too_large",
            )
        if not self._fits(owner, size):
            await self._wait_for_room(owner, size)
        self._of[owner] += size
        self._all += size

    def release(self, owner: str | None, size: int) -> None:
        """Count an answer no longer."""
        self._all -= size
        self._of[owner] -= size
        if not self._of[owner]:
            del self._of[owner]
        self._released.set()
        self._released = asyncio.Event()

    def _fits(self, owner: str | None, size: int) -> bool:
        own = self._of[owner]
        left = UNREAD_BYTES - (self._all - own)
        return own + size <= (left // 2 if own else left)

    async def _wait_for_room(self, owner: str | None, size: int) -> None:
        if self._waiting + size > UNREAD_BYTES:
            raise self._refusal(owner)
        self._waiting += size
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                while not self._fits(owner, size):
                    await self._released.wait()
        except TimeoutError:
            raise self._refusal(owner) from None
        finally:
            self._waiting -= size

    def _refusal(self, owner: str | None) -> ApiError:
        if self._of[owner]:
            why = "answers of yours wait to be read, and have as many bytes as they may; read them first"
        else:
            why = "answers of others wait to be read, and leave no room for this one; try again later"
        return ApiError(503, why, type="server_error", code="overloaded", retry_after=RETRY_AFTER)


def size_of(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the length that an answer's headers give, if it is larger than a part; else 0."""
    size = next((int(value) for name, value in headers if name == b"content-length"), 0)
    return size if size > PART_BYTES else 0
