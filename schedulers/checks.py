"""Checks of options, and texts for errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from math import inf


def at_least(low: float, unit: str = "", /, **options: float) -> None:
    """Raise ValueError for the first option that is below ``low``, infinite or no number."""
    for name, value in options.items():
        if not low <= value < inf:
            raise ValueError(f"{name}={value}: must be >= {low:g} {unit}".rstrip() + ", and finite")


def nearest(name: object, known: Iterable[object]) -> str:
    """Return " (did you mean 'lru'?)", or "" if no known name is near."""
    close = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def error_text(error: BaseException) -> str:
    """Return the error's type and message. The message is made by the policy's code, so it may raise too."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except BaseException as second:  # a CancelledError that nobody has asked for, too
        if isinstance(second, (KeyboardInterrupt, SystemExit)):
            raise
        return f"{name} (its message raises {type(second).__name__})"
