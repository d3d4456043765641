"""Metrics of guided decoding: the outcomes of compiles, and the number of grammars that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from aioengine.metrics.collect.snapshot import gauge
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.storage import Counters, Family, Histograms

OUTCOMES = ("compiled", "invalid", "limit", "overloaded", "failed")


class GrammarMetrics:
    """Metrics of grammars; each compile is reported on the event loop's thread."""

    def __init__(self) -> None:
        self._compiles = Counters(d.GRAMMAR_COMPILES, *((outcome,) for outcome in OUTCOMES))
        self._seconds = Histograms(d.GRAMMAR_COMPILE)
        self._kept: list[Callable[[], int]] = []

    def compiled(self, outcome: str, seconds: float) -> None:
        """Count a compile. ``outcome`` is one of ``OUTCOMES``."""
        self._compiles.inc((outcome,))
        self._seconds.at().observe(seconds)

    def count(self, kept: Callable[[], int]) -> None:
        """Add ``kept()``, a number of grammars, to the gauge at each scrape."""
        self._kept.append(kept)

    def families(self, engine: str) -> Iterator[Family]:
        yield self._compiles.family(engine)
        yield self._seconds.family(engine)
        yield gauge(engine, d.GRAMMARS_KEPT, ((), float(sum(kept() for kept in self._kept))))
