"""Counters and histograms as plain numbers, written by one thread.

Those of ``prometheus_client`` take a lock for each number, accept one observation at a time, and cannot add
one series to another. That would cost too much for a step of 256 requests.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from aioengine.metrics.families.definitions import Definition

Labels = tuple[str, ...]


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


class Counters:
    """One counter metric: a number for each tuple of label values."""

    __slots__ = ("definition", "values")

    def __init__(self, definition: Definition, *initial: Labels) -> None:
        """``initial``: label values known beforehand, whose series exist from the start, at 0."""
        self.definition = definition
        self.values: dict[Labels, float] = dict.fromkeys(initial if definition.labels else [()], 0.0)

    def inc(self, labels: Labels = (), amount: float = 1.0) -> None:
        values = self.values
        values[labels] = values.get(labels, 0.0) + amount

    def fold(self, label: str, into: str) -> None:
        """Add the series whose first label is ``label`` to those with ``into``, and remove them."""
        for labels in [key for key in self.values if key[0] == label]:
            self.inc((into, *labels[1:]), self.values.pop(labels))

    def family(self, engine: str) -> Family:
        return Family(self.definition, [((engine, *labels), value) for labels, value in self.values.items()])


class Series:
    """One series of a histogram."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: list[ExemplarPoint | None] = [None] * (len(bounds) + 1)

    def observe(self, value: float, count: int = 1) -> None:
        """Record ``count`` observations of the same value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def observe_request(self, value: float, request_id: str, time: float) -> None:
        """Record one observation, which becomes its bucket's exemplar. ``time`` is Unix time."""
        index = bisect_left(self.bounds, value)
        self.counts[index] += 1
        self.total += value
        self.exemplars[index] = ExemplarPoint(request_id, value, time)

    def add(self, other: Series) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
        pairs = zip(self.exemplars, other.exemplars, strict=True)
        self.exemplars = [theirs or mine for mine, theirs in pairs]

    def point(self) -> HistogramPoint:
        return HistogramPoint(tuple(self.counts), self.total, tuple(self.exemplars))


class Histograms:
    """One histogram metric: a series for each tuple of label values."""

    __slots__ = ("definition", "series")

    def __init__(self, definition: Definition, *initial: Labels) -> None:
        self.definition = definition
        self.series: dict[Labels, Series] = {}
        for labels in initial if definition.labels else [()]:
            self.at(labels)

    def at(self, labels: Labels = ()) -> Series:
        found = self.series.get(labels)
        if found is None:
            found = self.series[labels] = Series(self.definition.buckets)
        return found

    def fold(self, label: str, into: str) -> None:
        """Merge the series of one label into those of another, as :meth:`Counters.fold` does."""
        for labels in [key for key in self.series if key[0] == label]:
            self.at((into, *labels[1:])).add(self.series.pop(labels))

    def family(self, engine: str) -> Family:
        points = [((engine, *labels), series.point()) for labels, series in self.series.items()]
        return Family(self.definition, list(points))
