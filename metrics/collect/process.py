"""Metrics of the engine's process, from ``prometheus_client`` and psutil."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psutil
from prometheus_client import ProcessCollector

from aioengine.metrics.collect.snapshot import gauge
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.storage import Family

_THEIRS = {definition.name: definition for definition in d.PROCESS}


class ProcessMetrics:
    """Metrics of the process. Those that need ``/proc`` are exported only where it exists."""

    def __init__(self) -> None:
        self._collector = ProcessCollector(registry=None)
        self._process = psutil.Process()

    def families(self, engine: str) -> Iterator[Family]:
        for metric in self._collector.collect():
            definition = _THEIRS.get(metric.name)
            if definition is not None and metric.samples:
                yield gauge(engine, definition, ((), metric.samples[0].value))
        yield gauge(engine, d.PROCESS_THREADS, ((), self._process.num_threads()))
        try:
            tasks = len(asyncio.all_tasks())
        except RuntimeError:  # the loop has ended
            tasks = 0
        yield gauge(engine, d.EVENT_LOOP_TASKS, ((), tasks))
