"""A gateway's limits, kept in step with those of the other gateways to the same fleet."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aioengine.runtime.client import Usage
from aioengine.tasks import Background

if TYPE_CHECKING:
    from aioengine.server.access.gate import Gate

logger = logging.getLogger("aioengine.fleet")

SHARE_SECONDS = 0.5
"""Seconds between two exchanges, which also show that this gateway lives. A limit is exceeded by at most the
requests of two intervals: one until a gateway has reported its usage, and one until the others have received
the report."""


class SharedLimits:
    """Reports this gateway's usage to the registry, and gets that of the other gateways.

    While the registry does not answer, each gateway counts for itself, and reports later.
    """

    def __init__(self, gateway: str, config: bytes) -> None:
        self._gateway = gateway
        self._config = config
        self._background = Background()
        self.ledger: Gate | None = None
        """What has limits, if anything has."""

    def start(self, registry: Any) -> None:
        self._background.spawn(self._run(registry), "aioengine-limits")

    async def stop(self) -> None:
        await self._background.end()

    async def _run(self, registry: Any) -> None:
        kept: dict[str, Usage] = {}
        while True:
            for name, usage in (self.ledger.take_usage() if self.ledger else {}).items():
                kept[name] = kept.get(name, Usage()).then(usage)
            try:
                found = await registry.exchange.remote(self._gateway, kept)
                if found is None:
                    await registry.join.remote(self._gateway, self._config)
                    continue
                kept = {}
                if self.ledger is not None:
                    self.ledger.used_elsewhere(found)
            except Exception as error:  # the actor is being restarted, or Ray's head is gone
                logger.warning("limits are not shared now: %s", type(error).__name__)
            await asyncio.sleep(SHARE_SECONDS)
