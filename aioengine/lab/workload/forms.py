"""Short texts for parts of a workload: a name with numbers ("gamma:rate=2,cv=4"), which a struct then holds,
and numbers with their shares ("8:0.5,64:0.5")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from aioengine.checks import check_fields, nearest
from aioengine.errors import ConfigError


class Form(msgspec.Struct):
    """Numbers of a distribution. The first number in its text may stand without a name."""

    def __post_init__(self) -> None:
        check_fields(self)


F = TypeVar("F", bound=Form)


def parse_form(field: str, text: str, forms: Mapping[str, type[F]]) -> F:
    """Parse "name", "name:number" or "name:key=number,...".

    Raises ConfigError, which names ``field`` and what it allows.
    """

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"{field}={text!r}: {why}")

    name, colon, rest = text.partition(":")
    if name not in forms:
        known = ", ".join(_usage(name, form) for name, form in forms.items())
        raise wrong(f"there is no {name!r}{nearest(name, forms)}; there are {known}")
    form = forms[name]
    options = form.__struct_fields__
    values: dict[str, float] = {}
    for part in rest.split(",") if colon else ():
        key, equals, number = part.partition("=")
        if not equals and not values and options:
            key, number = options[0], part
        if key not in options:
            raise wrong(f"{name} does not take {part!r}{nearest(key, options)}; write {_usage(name, form)}")
        if key in values:
            raise wrong(f"{key} is given twice")
        values[key] = parse_number(field, text, number)
    for option in msgspec.structs.fields(form):
        if option.required and option.name not in values:
            raise wrong(f"{option.name} is missing; write {_usage(name, form)}")
    try:
        return form(**values)
    except ConfigError as error:
        raise wrong(str(error)) from error


def _usage(name: str, form: type[Form]) -> str:
    """Return "gamma:rate=...,cv=..."."""
    options = ",".join(f"{option}=..." for option in form.__struct_fields__)
    return f"{name}:{options}" if options else name


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
    if not (number.strip().removeprefix("-").isdecimal() and low <= int(number) <= high):
        raise ConfigError(f"{field}={text!r}: {number!r} is not a whole number in {low}..{high}")
    return int(number)
