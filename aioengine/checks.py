"""Checks of numbers that somebody gave, with one wording for all of them."""

from __future__ import annotations

import math

from aioengine.errors import AioEngineError, ConfigError


def check_integer(
    field: str,
    value: object,
    *,
    low: int | None = None,
    high: int | None = None,
    error: type[AioEngineError] = ConfigError,
) -> None:
    """Raise ``error``, naming ``field``, unless ``value`` is an integer in ``low..high``."""
    bound = "" if low is None else f">= {low}" if high is None else f"in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{field}={value!r}: must be an integer {bound}".rstrip())
    if (low is not None and value < low) or (high is not None and value > high):
        raise error(f"{field}={value}: must be {bound}")


def check_number(
    field: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    above: bool = False,
    error: type[AioEngineError] = ConfigError,
) -> None:
    """Raise ``error``, naming ``field``, unless ``value`` is a finite number from ``low`` to ``high``; with
    ``above``, ``low`` itself is not allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise error(f"{field}={value!r}: must be a finite number")
    if value < low or value > high or (above and value == low):
        if high == math.inf:
            bound = f"more than {low:g}" if above else f">= {low:g}"
        else:
            bound = f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise error(f"{field}={value}: must be {bound}")


def check_seconds(
    field: str,
    value: object,
    allowed: str = "",
    *,
    finite: bool = False,
    error: type[AioEngineError] = ConfigError,
) -> None:
    """Raise ``error``, naming ``field``, unless ``value`` is more than 0 and, if it must be, ``finite``;
    ``allowed`` ends the sentence."""
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0
    if wrong or (finite and value == math.inf):
        raise error(f"{field}={value!r}: must be more than 0 seconds{allowed}")
