"""Counters and histograms as plain numbers, written by one thread.

Those of ``prometheus_client`` take a lock for each number, accept one observation at a time, and cannot add
one series to another. That would cost too much for a step of 256 requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from aioengine.metrics.families.definitions import ALL, Definition, Labels
from aioengine.metrics.families.labels import OTHER


class ExemplarPoint(NamedTuple):
    """One observation, with the id of its request."""

    request_id: str
    value: float
    time: float
    """Unix time."""


class HistogramPoint(NamedTuple):
    """A histogram series at one moment; ``counts`` are by bucket, not cumulative, "+Inf" last."""

    counts: tuple[int, ...]
    total: float
    exemplars: tuple[ExemplarPoint | None, ...]


class Family(NamedTuple):
    """A metric and its series at one moment. Labels include ``engine``, as the first."""

    definition: Definition
    points: list[tuple[Labels, float | HistogramPoint]]


Value = float | Mapping[Labels, float]
"""The value of a metric without labels, or those of its series."""


def gauge(engine: str, name: str, value: Value) -> Family:
    """Return a family of numbers that are read at each scrape."""
    series = value if isinstance(value, Mapping) else {(): value}
    return Family(ALL[name], [((engine, *labels), float(number)) for labels, number in series.items()])


class Series:
    """One series of a histogram."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: list[ExemplarPoint | None] = [None] * (len(bounds) + 1)

    def add(self, other: Series) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
        pairs = zip(self.exemplars, other.exemplars, strict=True)
        self.exemplars = [theirs or mine for mine, theirs in pairs]

    def point(self) -> HistogramPoint:
        return HistogramPoint(tuple(self.counts), self.total, tuple(self.exemplars))


class Store:
    """Counters and histograms, by their names in the table of definitions."""

    def __init__(self, definitions: Mapping[str, Definition]) -> None:
        self._counters: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, Series]] = {}
        for name, definition in definitions.items():
            if definition.kind == "counter":
                self._counters[name] = dict.fromkeys(definition.initial, 0.0)
            elif definition.kind == "histogram":
                self._histograms[name] = {labels: Series(definition.buckets) for labels in definition.initial}

    def inc(self, name: str, labels: Labels = (), amount: float = 1.0) -> None:
        """Add to a counter."""
        values = self._counters[name]
        values[labels] = values.get(labels, 0.0) + amount

    def count(self, name: str, total: float) -> None:
        """Set a counter without labels to what somebody else has counted."""
        self._counters[name][()] = total

    def observe(self, name: str, value: float, labels: Labels = (), count: int = 1) -> None:
        """Record ``count`` observations of the same value in a histogram."""
        series = self._histograms[name].get(labels) or self.series(name, labels)
        series.counts[bisect_left(series.bounds, value)] += count
        series.total += value * count

    def observe_request(self, name: str, value: float, label: str, request_id: str, time: float) -> None:
        """Record one observation, which becomes its bucket's exemplar. ``time`` is Unix time."""
        self.observe(name, value, (label,))
        series = self.series(name, (label,))
        series.exemplars[bisect_left(series.bounds, value)] = ExemplarPoint(request_id, value, time)

    def series(self, name: str, labels: Labels) -> Series:
        """Return a series of a histogram, which is made if it is not there."""
        known = self._histograms[name]
        found = known.get(labels)
        if found is None:
            found = known[labels] = Series(ALL[name].buckets)
        return found

    def fold(self, kind: str, label: str) -> None:
        """Add the series whose first label, of this kind, is ``label`` to those of "other", and remove
        them."""
        for name, values in self._counters.items():
            for labels in _of(values, name, kind, label):
                self.inc(name, (OTHER, *labels[1:]), values.pop(labels))
        for name, series in self._histograms.items():
            for labels in _of(series, name, kind, label):
                self.series(name, (OTHER, *labels[1:])).add(series.pop(labels))

    def families(self, engine: str) -> Iterator[Family]:
        for name, values in self._counters.items():
            yield gauge(engine, name, values)
        for name, series in self._histograms.items():
            yield Family(ALL[name], [((engine, *labels), one.point()) for labels, one in series.items()])


def _of(series: Iterable[Labels], name: str, kind: str, label: str) -> list[Labels]:
    """Return the labels of a metric's series that begin with ``label``, if its first label is a ``kind``."""
    return [labels for labels in series if labels[0] == label] if ALL[name].labels[:1] == (kind,) else []
