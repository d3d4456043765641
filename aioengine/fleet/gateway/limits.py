"""A gateway's limits, kept in step with those of the other gateways to the same fleet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aioengine.runtime.client import Usage

if TYPE_CHECKING:
    from aioengine.server.access.gate import Gate

logger = logging.getLogger("aioengine.fleet")

SHARE_SECONDS = 0.5
"""Seconds between two exchanges, which also show that this gateway lives. A limit is exceeded by at most the
requests of two intervals: one until a gateway has reported its usage, and one until the others have received
the report."""


async def share_limits(gateway: str, config: bytes, registry: Any, ledger: Callable[[], Gate | None]) -> None:
    """Report this gateway's usage to the registry, and get that of the other gateways, until cancelled. While
    the registry does not answer, each gateway counts for itself, and reports later.

    ``ledger``: Returns what has limits, if anything has."""
    kept: dict[str, Usage] = {}
    while True:
        own = ledger()
        for name, usage in own.take_usage().items() if own else ():
            kept[name] = kept.get(name, Usage()).then(usage)
        try:
            found = await registry.exchange.remote(gateway, kept)
            if found is None:
                await registry.join.remote(gateway, config)
                continue
            kept = {}
            if own is not None:
                own.used_elsewhere(found)
        except Exception as error:  # the actor is being restarted, or Ray's head is gone
            logger.warning("limits are not shared now: %s", type(error).__name__)
        await asyncio.sleep(SHARE_SECONDS)
