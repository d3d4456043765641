"""Limits and logs requests without a valid key."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, OrderedDict

from aioengine.server.access.limits import Bucket
from aioengine.server.errors import ApiError

logger = logging.getLogger("aioengine.server")

PER_MINUTE = 60
"""Number of 401 answers per address and minute; further ones are 429."""
MAX_ADDRESSES = 4096
"""Maximum number of addresses; beyond it the one refused longest ago is forgotten."""
LOG_SECONDS = 60.0


class Refusals:
    """Counts refusals by client address. A valid key is never refused, whatever its address has sent: keys
    cannot be guessed, so the limit protects processor time and the log, not the keys."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def refuse(self, address: str, error: ApiError) -> ApiError:
        """Return the error to send to ``address``: ``error``, which is a 401, or a 429 after too many of
        these."""
        loop = asyncio.get_running_loop()
        self._note(address, loop)
        bucket = self._buckets.setdefault(address, Bucket(PER_MINUTE))
        self._buckets.move_to_end(address)
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        wait = bucket.wait(loop.time())
        if not wait:
            bucket.take(1, loop.time())
            return error
        return ApiError(
            429,
            "too many requests without a valid API key from this address; correct the key",
            type="rate_limit_error",
            code="too_many_invalid_keys",
            retry_after=max(1, math.ceil(wait)),
            close=True,
        )

    def close(self) -> None:
        """Log the remaining counts."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._tell()

    def _note(self, address: str, loop: asyncio.AbstractEventLoop) -> None:
        """Count a refusal. The first is logged at once, those of the next ``LOG_SECONDS`` in one line."""
        if self._timer is None:
            logger.warning("refused a request from %s: no valid API key", address)
            self._timer = loop.call_later(LOG_SECONDS, self._due, loop)
        else:
            is_known = address in self._counts or len(self._counts) < MAX_ADDRESSES
            self._counts[address if is_known else "others"] += 1

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(LOG_SECONDS, self._due, loop) if self._tell() else None

    def _tell(self) -> bool:
        """Log the counted refusals. Returns False if there were none."""
        for address, most in self._counts.most_common(1):
            logger.warning(
                "refused %d more requests without a valid API key, from %d addresses; most, %d, from %s",
                *(self._counts.total(), len(self._counts), most, address),
            )
        told = bool(self._counts)
        self._counts.clear()
        return told
