"""Distributions of lengths of prompts and outputs, and of ranks and sizes of adapters."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from aioengine.checks import nearest, parse_bytes
from aioengine.errors import ConfigError
from aioengine.lab.workload.random_streams import Weighted, log_normal, stream
from aioengine.lab.workload.requests import AdapterShape
from aioengine.lab.workload.spec_text import Option, parse_form, parse_shares, parse_whole

MAX_TOKENS = 2**24
MAX_RANK = 512
Draw = Callable[[Random], int]
"""Draws whole numbers >= 1."""


def shares(field: str, text: str, *, low: int, high: int) -> Draw:
    """Parse "16", or "8:0.5,16:0.3,64:0.2": some numbers, each with its share. Raises ConfigError."""
    found = parse_shares(field, text, low=low, high=high)
    numbers, table = list(found), Weighted(list(found.values()))
    return lambda rng: numbers[table.draw(rng)]


def parse_ranks(field: str, value: int | str) -> Draw:
    """Parse 16, "16" or "8:0.5,16:0.3,64:0.2". Raises ConfigError."""
    return shares(field, str(value), low=1, high=MAX_RANK)


def parse_lengths(field: str, value: int | str) -> Draw:
    """Parse tokens: 128, "128", "uniform:8..512" or "lognormal:median=200,sigma=0.8". Raises ConfigError."""
    text = str(value)
    return _parse(field, text, lambda number: parse_whole(field, text, number, low=1, high=MAX_TOKENS))


def parse_sizes(field: str, value: int | str) -> Draw:
    """Parse bytes, in the same forms; "64MiB" and "uniform:8MiB..64MiB" too. Raises ConfigError."""
    return _parse(field, str(value), lambda number: parse_bytes(number, field=field), most=2.0**50)


def draw_shape(name: str, ranks: Draw, sizes: Draw | None, seed: int) -> AdapterShape:
    """Return the adapter's shape, which depends on its name and not on other draws."""
    rank = ranks(stream(seed, f"rank of {name}"))
    return AdapterShape(name, rank, None if sizes is None else sizes(stream(seed, f"size of {name}")))


def _parse(field: str, text: str, number: Callable[[str], int], *, most: float = 32_768.0) -> Draw:
    name, colon, rest = text.partition(":")
    if name == "uniform":
        first, dots, last = rest.partition("..")
        if not dots:
            raise ConfigError(f"{field}={text!r}: write uniform:LOW..HIGH")
        low, high = number(first), number(last)
        if low > high:
            raise ConfigError(f"{field}={text!r}: {first} is more than {last}")
        return lambda rng: low + int(rng.random() * (high - low + 1))
    if name == "lognormal":
        values = parse_form(field, text, {"lognormal": _log_normal(most)}).values
        low, high = int(values["min"]), int(values["max"])
        if low > high:
            raise ConfigError(f"{field}={text!r}: min={low} is more than max={high}")
        median, sigma = values["median"], values["sigma"]
        return lambda rng: max(round(min(log_normal(rng, median, sigma), high)), low)
    if colon or name.isalpha():
        hint = nearest(name, ("uniform", "lognormal"))
        raise ConfigError(
            f"{field}={text!r}: there is no {name!r}{hint}; write a number, uniform:LOW..HIGH or "
            "lognormal:median=...,sigma=..."
        )
    value = number(text)
    return lambda rng: value


def _log_normal(most: float) -> dict[str, Option]:
    """Return what a lognormal distribution takes: ``sigma`` is the deviation of the logarithm, and values are
    clipped to ``min`` and ``max``, which is ``most`` by default."""
    return {
        "median": Option(low=1.0, above=False),
        "sigma": Option(low=0.0, high=10.0, above=False),
        "min": Option(1.0, low=1.0, above=False),
        "max": Option(most, low=1.0, above=False),
    }
