"""Prometheus metrics of an engine, in a separate registry, and the ways to export them."""

from aioengine.metrics.collectors import EngineMetrics
from aioengine.metrics.combined import combined_registry
from aioengine.metrics.exporter import MetricsServer, serve_metrics

__all__ = ["EngineMetrics", "MetricsServer", "combined_registry", "serve_metrics"]
