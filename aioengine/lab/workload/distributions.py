"""Distributions of lengths of prompts and outputs, and of ranks and sizes of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from random import Random

from aioengine.checks import nearest, parse_bytes
from aioengine.errors import ConfigError
from aioengine.lab.workload.random_streams import Weighted, log_normal, stream
from aioengine.lab.workload.requests import AdapterShape
from aioengine.lab.workload.spec_text import Option, parse_form, parse_shares, parse_whole

MAX_TOKENS = 2**24
MAX_RANK = 512
_LOG_NORMAL = {
    "lognormal": {
        "median": Option(low=1.0, above=False),
        "sigma": Option(low=0.0, high=10.0, above=False),
        "min": Option(1.0, low=1.0, above=False),
        "max": Option(32_768.0, low=1.0, above=False),
    }
}


class Distribution(ABC):
    """Distribution of whole numbers >= 1."""

    @abstractmethod
    def draw(self, rng: Random) -> int: ...


class Constant(Distribution):
    """Always the same."""

    def __init__(self, value: int) -> None:
        self.value = value

    def draw(self, rng: Random) -> int:
        return self.value


class Uniform(Distribution):
    """Uniform over ``low..high``, both included."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def draw(self, rng: Random) -> int:
        return self.low + int(rng.random() * (self.high - self.low + 1))


class LogNormal(Distribution):
    """``sigma`` is the deviation of the logarithm; values outside ``low..high`` are clipped."""

    def __init__(self, median: float, sigma: float, low: int, high: int) -> None:
        self.median = median
        self.sigma = sigma
        self.low = low
        self.high = high

    def draw(self, rng: Random) -> int:
        drawn = min(log_normal(rng, self.median, self.sigma), self.high)
        return max(round(drawn), self.low)


class Shares(Distribution):
    """Some numbers, each with its share."""

    def __init__(self, shares: dict[int, float]) -> None:
        self.shares = shares
        self.numbers = list(shares)
        self._table = Weighted(list(shares.values()))

    def draw(self, rng: Random) -> int:
        return self.numbers[self._table.draw(rng)]


def parse_lengths(field: str, value: int | str) -> Distribution:
    """Parse tokens: 128, "128", "uniform:8..512" or "lognormal:median=200,sigma=0.8". Raises ConfigError."""
    text = str(value)
    return _parse(field, text, lambda number: parse_whole(field, text, number, low=1, high=MAX_TOKENS))


def parse_sizes(field: str, value: int | str) -> Distribution:
    """Parse bytes, in the same forms; "64MiB" and "uniform:8MiB..64MiB" too. Raises ConfigError."""
    return _parse(field, str(value), lambda number: parse_bytes(number, field=field), default_max=2.0**50)


def parse_ranks(field: str, value: int | str) -> Shares:
    """Parse 16, "16" or "8:0.5,16:0.3,64:0.2". Raises ConfigError."""
    return Shares(parse_shares(field, str(value), low=1, high=MAX_RANK))


def draw_shape(name: str, ranks: Shares, sizes: Distribution | None, seed: int) -> AdapterShape:
    """Return the adapter's shape, which depends on its name and not on other draws."""
    rank = ranks.draw(stream(seed, f"rank of {name}"))
    nbytes = None if sizes is None else sizes.draw(stream(seed, f"size of {name}"))
    return AdapterShape(name, rank, nbytes)


def _parse(
    field: str, text: str, number: Callable[[str], int], *, default_max: float | None = None
) -> Distribution:
    name, colon, rest = text.partition(":")
    if name == "uniform":
        first, dots, last = rest.partition("..")
        if not dots:
            raise ConfigError(f"{field}={text!r}: write uniform:LOW..HIGH")
        low, high = number(first), number(last)
        if low > high:
            raise ConfigError(f"{field}={text!r}: {first} is more than {last}")
        return Uniform(low, high)
    if name == "lognormal":
        forms = _LOG_NORMAL
        if default_max is not None:
            options = forms["lognormal"]
            forms = {"lognormal": {**options, "max": options["max"]._replace(default=default_max)}}
        values = parse_form(field, text, forms).values
        low, high = int(values["min"]), int(values["max"])
        if low > high:
            raise ConfigError(f"{field}={text!r}: min={low} is more than max={high}")
        return LogNormal(values["median"], values["sigma"], low, high)
    if colon or name.isalpha():
        hint = nearest(name, ("uniform", "lognormal"))
        raise ConfigError(
            f"{field}={text!r}: there is no {name!r}{hint}; write a number, uniform:LOW..HIGH or "
            "lognormal:median=...,sigma=..."
        )
    return Constant(number(text))
