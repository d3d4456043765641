"""Parameters of which all but a few are slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Make values of ``parametrize`` of which all but those in ``fast`` are slow."""
    values = list(values)
    assert all(value in values for value in fast), f"{fast}: not all are among {values}"
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def mostly_slow_rows(rows: Iterable[tuple[Any, ...]], *fast: tuple[Any, ...]) -> list[Any]:
    """Do the same for several arguments at once."""
    rows = list(rows)
    assert all(row in rows for row in fast), f"{fast}: not all are among {rows}"
    return [row if row in fast else pytest.param(*row, marks=pytest.mark.slow) for row in rows]
