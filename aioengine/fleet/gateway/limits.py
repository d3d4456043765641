"""A gateway's limits, kept in step with those of the other gateways to the same fleet."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aioengine.runtime.client import Usage
from aioengine.tasks import end_tasks

if TYPE_CHECKING:
    from aioengine.server.access.gate import Gate

logger = logging.getLogger("aioengine.fleet")

SHARE_SECONDS = 0.5
"""Seconds between two exchanges. A limit is exceeded by at most the requests of two intervals: one until a
gateway has reported its usage, and one until the others have received the report."""
ALIVE_SECONDS = 10.0
"""The same where there are no limits: the registry has to hear now and then that this gateway lives."""


class SharedLimits:
    """Reports this gateway's usage to the registry, and gets that of the other gateways.

    While the registry does not answer, each gateway counts for itself, and reports later.
    """

    def __init__(self, gateway: str, config: bytes) -> None:
        self._gateway = gateway
        self._config = config
        self._ledgers: list[Gate] = []
        self._has_limits = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def share(self, ledger: Gate) -> None:
        self._ledgers.append(ledger)
        self._has_limits.set()

    def start(self, registry: Any) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(registry), name="aioengine-limits")

    async def stop(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])

    async def _run(self, registry: Any) -> None:
        kept: dict[str, Usage] = {}
        while True:
            for ledger in self._ledgers:
                for name, usage in ledger.take_usage().items():
                    kept[name] = kept.get(name, Usage()).then(usage)
            try:
                found = await registry.exchange.remote(self._gateway, kept)
                if found is None:
                    await registry.join.remote(self._gateway, self._config)
                    continue
                kept = {}
                for ledger in self._ledgers:
                    ledger.used_elsewhere(found)
            except Exception as error:  # the actor is being restarted, or Ray's head is gone
                logger.warning("limits are not shared now: %s", type(error).__name__)
            if self._ledgers:
                await asyncio.sleep(SHARE_SECONDS)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(ALIVE_SECONDS):
                    await self._has_limits.wait()
