"""Means over seeds, with their 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence

from aioengine.lab.analysis.statistics import estimate


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and half the width of its 95% interval by Student's t; None for a single value."""
    found = estimate(values)
    return found.mean, None if found.high is None else found.high - found.mean


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Return both as a text."""
    mean, half = mean_and_half(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
