"""Prometheus metrics of an engine, in a registry of its own."""

from aioengine.metrics.collectors import EngineMetrics

__all__ = ["EngineMetrics"]
