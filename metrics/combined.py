"""Several engines' metrics in one scrape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aioengine.metrics.collectors import EngineMetrics
from aioengine.metrics.families.exposition import to_metric
from aioengine.metrics.families.storage import merged


class HasMetrics(Protocol):
    """A running engine."""

    @property
    def metrics(self) -> EngineMetrics: ...


class _Combined(Collector):
    def __init__(self, sources: list[EngineMetrics]) -> None:
        self._sources = sources

    def describe(self) -> Iterator[Metric]:
        return iter({metric.name: metric for s in self._sources for metric in s.describe()}.values())

    def collect(self) -> Iterator[Metric]:
        return map(to_metric, merged(family for source in self._sources for family in source.families()))


def combined_registry(*engines: HasMetrics) -> CollectorRegistry:
    """Make a registry of the metrics of several engines, which differ by the label ``engine``.

    Raises ValueError if two engines have the same ``EngineConfig.name``.
    """
    sources = [engine.metrics for engine in engines]
    names = [source.engine for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"the engines are called {', '.join(names)}: give each another EngineConfig.name")
    registry = CollectorRegistry()
    registry.register(_Combined(sources))
    return registry
