"""Traces of a server: sent while it runs, and the last ones when it ends."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aioengine.metrics.otlp import end_tracing, otlp_provider

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("aioengine.server")


@asynccontextmanager
async def tracing(endpoint: str | None, engine: str) -> AsyncIterator[TracerProvider | None]:
    """Context with a provider of tracers, if there is a collector to send spans to. Raises ConfigError."""
    provider = otlp_provider(
        endpoint,
        resource={
            "service.instance.id": f"{platform.node()}-{os.getpid()}",
            "aioengine.engine": engine,
        },
    )
    if provider is None:
        yield None
        return
    logger.info("requests are traced, and their spans are sent by OTLP over HTTP")
    try:
        yield provider
    finally:
        await end_tracing(provider)
