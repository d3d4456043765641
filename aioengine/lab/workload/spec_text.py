"""The short texts that parts of a workload are given in: "gamma:rate=2,cv=4", "zipf:1.0", "8:0.5,64:0.5"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from aioengine.checks import nearest
from aioengine.errors import ConfigError


class Option(NamedTuple):
    """A number that a form takes."""

    default: float | None = None
    """None: it must be given."""
    low: float = 0.0
    high: float = math.inf
    above: bool = True
    """Whether it must be more than ``low``, which itself is not allowed."""

    def range(self) -> str:
        """ "> 0", "in 0..1" """
        if self.high == math.inf:
            return f"{'>' if self.above else '>='} {number_text(self.low)}"
        low, high = number_text(self.low), number_text(self.high)
        return f"> {low} and <= {high}" if self.above else f"in {low}..{high}"


Forms = Mapping[str, Mapping[str, Option]]
"""Name -> what it takes, by name; a number without a name is the first."""


class Form(NamedTuple):
    """A name with its numbers, defaults filled in."""

    name: str
    values: dict[str, float]

    def __str__(self) -> str:
        numbers = ",".join(f"{key}={number_text(value)}" for key, value in self.values.items())
        return f"{self.name}:{numbers}" if numbers else self.name


def parse_form(field: str, text: str, forms: Forms) -> Form:
    """Parse "name", "name:number" or "name:key=number,...".

    Raises ConfigError, which names ``field`` and what it allows.
    """
    name, colon, rest = text.partition(":")
    if name not in forms:
        known = ", ".join(map(usage, forms, forms.values()))
        raise ConfigError(f"{field}={text!r}: there is no {name!r}{nearest(name, forms)}; there are {known}")
    options = forms[name]
    values: dict[str, float] = {}
    for part in rest.split(",") if colon else ():
        key, equals, number = part.partition("=")
        if not equals and not values and options:
            key, number = next(iter(options)), part
        if key not in options:
            raise ConfigError(
                f"{field}={text!r}: {name} does not take {part!r}{nearest(key, options)}; "
                f"write {usage(name, options)}"
            )
        if key in values:
            raise ConfigError(f"{field}={text!r}: {key} is given twice")
        values[key] = _in_range(field, text, key, number, options[key])
    filled: dict[str, float] = {}
    for key, option in options.items():
        value = values.get(key, option.default)
        if value is None:
            raise ConfigError(f"{field}={text!r}: {key} is missing; write {usage(name, options)}")
        filled[key] = value
    return Form(name, filled)


def parse_shares(field: str, text: str, *, low: int, high: int) -> dict[int, float]:
    """Parse "16", or "8:0.5,64:0.5": whole numbers with their shares, which are scaled to a sum of 1. Raises
    ConfigError."""
    shares: dict[int, float] = {}
    for part in text.split(","):
        number, colon, share = part.partition(":")
        key = parse_whole(field, text, number, low=low, high=high)
        if key in shares:
            raise ConfigError(f"{field}={text!r}: {key} is given twice")
        if not colon and "," in text:
            raise ConfigError(f"{field}={text!r}: {part!r} has no share; write, say, '8:0.5,64:0.5'")
        shares[key] = parse_number(field, text, share) if colon else 1.0
    return dict(zip(shares, normalised(field, text, shares.values()), strict=True))


def normalised(field: str, text: str, weights: Iterable[float]) -> list[float]:
    """Scale weights to a sum of 1. Raises ConfigError if one is negative or all are 0."""
    found = list(weights)
    total = math.fsum(found)
    if min(found) < 0 or not 0 < total < math.inf:
        raise ConfigError(f"{field}={text!r}: shares must be >= 0, and one of them more than 0")
    return [weight / total for weight in found]


def parse_number(field: str, text: str, number: str) -> float:
    """Parse a finite number that is part of ``text``. Raises ConfigError."""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{field}={text!r}: {number!r} is not a number")
    return value


def parse_whole(field: str, text: str, number: str, *, low: int, high: int) -> int:
    """Parse a whole number that is part of ``text``. Raises ConfigError if it is not in ``low..high``."""
    try:
        value = int(number)
    except ValueError:
        raise ConfigError(f"{field}={text!r}: {number!r} is not a whole number") from None
    if not low <= value <= high:
        raise ConfigError(f"{field}={text!r}: {value} is not in {low}..{high}")
    return value


def number_text(value: float) -> str:
    """Return the shortest text that reads back as the same number: 2.0 is "2"."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def usage(name: str, options: Mapping[str, Option]) -> str:
    """ "gamma:rate=...,cv=..." """
    return f"{name}:{','.join(f'{key}=...' for key in options)}" if options else name


def _in_range(field: str, text: str, key: str, number: str, option: Option) -> float:
    value = parse_number(field, text, number)
    too_low = value <= option.low if option.above else value < option.low
    if too_low or value > option.high:
        raise ConfigError(f"{field}={text!r}: {key}={number} must be {option.range()}")
    return value
