"""Metrics of an engine that does not run yet."""

from __future__ import annotations

from aioengine.metrics.collect.snapshot import engine_state
from aioengine.metrics.families.exposition import TEXT, TextWriter


def starting_metrics(engine: str) -> tuple[str, bytes]:
    """Return the content type and text of ``/metrics`` while the engine with this name starts."""
    return TEXT, TextWriter().write([engine_state(engine, "starting")], openmetrics=False)
