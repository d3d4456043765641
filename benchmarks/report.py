"""Tables of measurements, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from aioengine.lab.analysis.statistics import estimate


class Table(NamedTuple):
    """A table; ``note`` stands below it."""

    title: str
    columns: Sequence[str]
    rows: Iterable[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.insert(1, " | ".join("-" * width for width in widths))
        body = "\n".join(f"| {line} |" for line in lines)
        return f"### {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def number(value: float) -> str:
    """Write a figure with three digits or more."""
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """Write the least and the most."""
    return f"{number(min(values))} .. {number(max(values))}"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of all are not above; NaN without values."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


def median(values: Sequence[float]) -> float:
    """Return the median; NaN without values."""
    return statistics.median(values) if values else float("nan")


def interval(values: Sequence[float]) -> str:
    """Write the mean over seeds with half the width of its 95% interval by Student's t."""
    found = estimate(values)
    return number(found.mean) + ("" if found.high is None else f" ± {number(found.high - found.mean)}")
