"""Lengths of prompts and outputs, ranks of adapters, and what policies are told of a request: how
long its output will be, and by when it must have ended."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Annotated

from msgspec import Meta

from aioengine.errors import ConfigError
from aioengine.lab.workload.forms import Form, parse_form, parse_number, parse_shares, parse_whole
from aioengine.lab.workload.random_streams import Weighted, log_normal, stream
from aioengine.lab.workload.requests import AdapterShape, Objective

MAX_TOKENS = 2**24
MAX_RANK = 512
Draw = Callable[[Random], int]
"""Draws whole numbers >= 1."""
AtLeastOne = Annotated[float, Meta(ge=1)]
Deviation = Annotated[float, Meta(ge=0, le=10)]
"""Of a logarithm."""


class Targets(Form):
    """Objectives for a request, in seconds, and apart: to its first token, and for each token after that."""

    ttft: Annotated[float, Meta(gt=0)] = 1e9
    tpot: Annotated[float, Meta(gt=0)] = 1e9


class LogNormal(Form):
    """Lognormal distribution, clipped to ``min`` and ``max``."""

    median: AtLeastOne
    sigma: Deviation
    min: AtLeastOne = 1.0
    max: AtLeastOne = 32_768.0


def shares(field: str, text: str, *, low: int, high: int) -> Draw:
    """Parse "16", or "8:0.5,16:0.3,64:0.2": some numbers, each with its share. Raises ConfigError."""
    found = parse_shares(field, text, low=low, high=high)
    numbers, table = list(found), Weighted(list(found.values()))
    return lambda rng: numbers[table.draw(rng)]


def parse_ranks(field: str, value: int | str) -> Draw:
    """Parse 16, "16" or "8:0.5,16:0.3,64:0.2". Raises ConfigError."""
    return shares(field, str(value), low=1, high=MAX_RANK)


def draw_shape(name: str, ranks: Draw, seed: int) -> AdapterShape:
    """Return the adapter's shape, which depends on its name and not on other draws."""
    return AdapterShape(name, ranks(stream(seed, f"rank of {name}")))


def parse_lengths(field: str, value: int | str) -> Draw:
    """Parse tokens: 128, "128", "uniform:8..512" or "lognormal:median=200,sigma=0.8". Raises ConfigError."""

    def number(part: str) -> int:
        return parse_whole(field, text, part, low=1, high=MAX_TOKENS)

    text = str(value)
    name, colon, rest = text.partition(":")
    if name == "uniform":
        first, dots, last = rest.partition("..")
        if not dots:
            raise ConfigError(f"{field}={text!r}: write uniform:LOW..HIGH")
        low, high = number(first), number(last)
        if low > high:
            raise ConfigError(f"{field}={text!r}: {first} is more than {last}")
        return lambda rng: low + int(rng.random() * (high - low + 1))
    if colon or name.isalpha():
        form = parse_form(field, text, {"lognormal": LogNormal, "uniform": LogNormal})
        least, most = int(form.min), int(form.max)
        if least > most:
            raise ConfigError(f"{field}={text!r}: min={least} is more than max={most}")
        median, sigma = form.median, form.sigma
        return lambda rng: max(round(min(log_normal(rng, median, sigma), most)), least)
    tokens = number(text)
    return lambda rng: tokens


# Information for policies


class Known(Form):
    """Policies know the length, as ``max_tokens``."""

    def tell(self, tokens: int, rng: Random) -> tuple[int, int | None, int | None]:
        """Return the length that an output of ``tokens`` has then, its ``max_tokens``, and a prediction."""
        return tokens, None, None


class Hidden(Known):
    """All that policies see is ``max_tokens``, the same for all requests."""

    max: Annotated[float, Meta(ge=1, le=MAX_TOKENS)] = 4096.0

    def tell(self, tokens: int, rng: Random) -> tuple[int, int | None, int | None]:
        return min(tokens, int(self.max)), int(self.max), None


class Predicted(Known):
    """Hidden, and a prediction, wrong by a factor whose logarithm is normal with the deviation ``error``:
    with 0.5 it is within a factor of 1.65 two times out of three."""

    error: Deviation
    max: Annotated[float, Meta(ge=1, le=MAX_TOKENS)] = 4096.0

    def tell(self, tokens: int, rng: Random) -> tuple[int, int | None, int | None]:
        length, most = min(tokens, int(self.max)), int(self.max)
        return length, most, max(round(min(log_normal(rng, length, self.error), most)), 1)


def parse_view(field: str, text: str) -> Known:
    """Parse "known", "hidden:max=4096" or "predicted:error=0.5,max=4096". Raises ConfigError."""
    forms: dict[str, type[Known]] = {"known": Known, "hidden": Hidden, "predicted": Predicted}
    return parse_form(field, text, forms)


def parse_deadline(field: str, value: float | str) -> Objective:
    """Parse seconds, or "proportional:0.5+0.05" (for each request, and for each token). Returns a function of
    a request's output tokens that gives its seconds from arrival. Raises ConfigError."""
    text = str(value)
    base, per_token = text, "0"
    if ":" in text:
        name, _, rest = text.partition(":")
        base, plus, per_token = rest.partition("+")
        if name != "proportional" or not plus:
            raise ConfigError(f"{field}={text!r}: write seconds, or proportional:BASE+PER_TOKEN in seconds")
    first, each = (parse_number(field, text, number) for number in (base, per_token))
    if min(first, each) < 0 or first + each <= 0:
        raise ConfigError(f"{field}={text!r}: must be more than 0 seconds")
    return lambda output_tokens: first + each * output_tokens


def parse_targets(field: str, value: float | str) -> Targets | None:
    """Parse "ttft=2,tpot=0.05", or one of the two; None: it is a time for the whole answer, in the form of
    :func:`parse_deadline`. Raises ConfigError."""
    if "=" not in str(value):
        parse_deadline(field, value)
        return None
    return parse_form(field, f"targets:{value}", {"targets": Targets})
