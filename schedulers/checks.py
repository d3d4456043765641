"""Checks of the options of policies and parts."""

from __future__ import annotations


def at_least(low: float, unit: str = "", /, **options: float) -> None:
    """Raise ValueError for the first option that is below ``low``, or no number."""
    for name, value in options.items():
        if not value >= low:
            raise ValueError(f"{name}={value}: must be >= {low:g} {unit}".rstrip())


def finite_weights(**options: float) -> None:
    """Raise ValueError for the first option that is negative, infinite or no number."""
    for name, value in options.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value}: must be >= 0 and finite")
