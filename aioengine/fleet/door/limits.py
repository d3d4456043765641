"""A door's limits, kept in step with those of the other doors to the same fleet."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aioengine.client import UsageLedger

logger = logging.getLogger("aioengine.fleet")

SHARE_SECONDS = 0.5
"""Between two exchanges. A limit is exceeded by at most what comes in within two: one until a door has told
what it let in, one until the others have heard of it."""


class SharedLimits:
    """Tells the registry what this door has let in, and learns what the others have.

    While the registry does not answer, each door counts for itself, and tells it later.
    """

    def __init__(self, door: str, config: bytes) -> None:
        self._door = door
        self._config = config
        self._ledgers: list[UsageLedger] = []
        self._task: asyncio.Task[None] | None = None

    def share(self, ledger: UsageLedger) -> None:
        self._ledgers.append(ledger)

    def start(self, registry: Any) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(registry), name="aioengine-limits")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, registry: Any) -> None:
        kept: dict[str, Any] = {}
        while True:
            for ledger in self._ledgers:
                kept = _added(kept, ledger.take_usage())
            try:
                found = await registry.exchange.remote(self._door, kept)
                if found is None:
                    await registry.join.remote(self._door, self._config)
                    continue
                kept = {}
                for ledger in self._ledgers:
                    ledger.used_elsewhere(found)
            except Exception as error:  # the actor is being restarted, or Ray's head is gone
                logger.warning("limits are not shared now: %s", type(error).__name__)
            await asyncio.sleep(SHARE_SECONDS)


def _added(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    found = dict(before)
    for name, usage in new.items():
        old = found.get(name)
        if old is not None:
            usage = usage._replace(requests=usage.requests + old.requests, tokens=usage.tokens + old.tokens)
        found[name] = usage
    return found
