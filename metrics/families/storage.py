"""Counters and histograms as plain numbers, written by one thread, and labels of bounded cardinality.

Those of ``prometheus_client`` take a lock for each number, accept one observation at a time, and cannot add
one series to another. That would cost too much for a step of 256 requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from aioengine.metrics.families.definitions import ALL, Definition, Labels

BASE = "base"
OTHER = "other"
NOBODY = "none"


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


def merged(families: Iterable[Family]) -> list[Family]:
    """Merge families of the same name, because the exposition format requires each metric's series in one
    group. One that is defined otherwise than the first is left out."""
    found: dict[str, Family] = {}
    for definition, points in families:
        known = found.setdefault(definition.name, Family(definition, []))
        if definition._replace(help=known.definition.help) == known.definition:
            known.points.extend(points)
    return list(found.values())


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


class BoundedLabels:
    """Maps names to label values, of which there are at most ``limit``, "other", and ``nobody`` for None.

    The first ``limit`` names get separate labels, the others share "other". A name in "other" with more than
    twice the requests of the least used labelled name takes its label. The factor of two keeps two names of
    equal use from taking turns: a label changes only as often as usage doubles.

    ``folded(label)`` is called when a label is removed: its series must be added to "other". ``kind`` says
    what the names stand for.
    """

    def __init__(self, limit: int, folded: Callable[[str], None], *, nobody: str, kind: str) -> None:
        self._limit = limit
        self._nobody = nobody
        self._kind = kind
        self._folded = folded
        self._labels: dict[str, str] = {}
        self._uses: dict[str, int] = {}
        self._least = 0
        """A lower bound on the uses of every adapter that has a label."""

    def of(self, name: str | None) -> str:
        if name is None:
            return self._nobody
        label = self._labels.get(name)
        if label is None:
            if len(self._labels) >= self._limit:
                return OTHER
            label = self._give(name)
        return label

    def used(self, name: str) -> None:
        """Count a request for ``name``, which may then get a separate label."""
        uses = self._uses[name] = self._uses.get(name, 0) + 1
        if name in self._labels or self._limit == 0:
            return
        if len(self._labels) < self._limit:
            self._give(name)
        elif uses > 2 * self._least:
            victim = min(self._labels, key=lambda name: self._uses.get(name, 0))
            self._least = self._uses.get(victim, 0)
            if uses > 2 * self._least:
                self._take(victim)
                self._give(name)

    def gone(self, name: str) -> None:
        """Free the label of a name that is no longer in use."""
        self._uses.pop(name, None)
        if name in self._labels:
            self._take(name)

    def _give(self, name: str) -> str:
        # A name that is really "base" or "other" gets a label with a space, which no adapter's name can
        # contain.
        label = f"{name} ({self._kind})" if name in (self._nobody, OTHER) else name
        self._labels[name] = label
        self._least = min(self._least, self._uses.get(name, 0))
        return label

    def _take(self, name: str) -> None:
        self._folded(self._labels.pop(name))
