"""Information for policies: how long a request's output will be, and by when it must have ended."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from aioengine.errors import ConfigError
from aioengine.lab.workload.random_streams import log_normal
from aioengine.lab.workload.spec_text import Option, parse_form, parse_number

_MAX = Option(4096.0, low=1.0, high=float(2**24), above=False)
FORMS = {
    "known": {},
    "hidden": {"max": _MAX},
    "predicted": {"error": Option(low=0.0, high=10.0, above=False), "max": _MAX},
}


class Prediction(NamedTuple):
    """An output's length, and what policies know of it."""

    output_tokens: int
    max_tokens: int | None
    expected_tokens: int | None


LengthView = Callable[[int, Random], Prediction]
"""Predicts an output of a length, which is then at most ``max_tokens``."""


def parse_view(field: str, text: str) -> LengthView:
    """Parse "known" (``max_tokens`` is the length), "hidden:max=4096" (it is the same for all) or
    "predicted:error=0.5,max=4096" (and there is a prediction, wrong by a factor whose logarithm is normal
    with this deviation: with 0.5 it is within a factor of 1.65 two times out of three). Raises
    ConfigError."""
    name, values = parse_form(field, text, FORMS)
    if name == "known":
        return lambda tokens, rng: Prediction(tokens, None, None)
    most = int(values["max"])
    if name == "hidden":
        return lambda tokens, rng: Prediction(min(tokens, most), most, None)
    error = values["error"]

    def predicted(tokens: int, rng: Random) -> Prediction:
        length = min(tokens, most)
        guess = min(log_normal(rng, length, error), most)
        return Prediction(length, most, max(round(guess), 1))

    return predicted


def parse_deadline(field: str, value: float | str) -> Callable[[int], float]:
    """Parse seconds, or "proportional:0.5+0.05" (for each request, and for each token). Returns a function of
    a request's output tokens that gives its seconds from arrival. Raises ConfigError."""
    text = str(value)
    name, colon, rest = text.partition(":")
    if not colon:
        base, per_token = parse_number(field, text, text), 0.0
    else:
        first, plus, token = rest.partition("+")
        if name != "proportional" or not plus:
            raise ConfigError(f"{field}={text!r}: write seconds, or proportional:BASE+PER_TOKEN in seconds")
        base, per_token = parse_number(field, text, first), parse_number(field, text, token)
    if min(base, per_token) < 0 or base + per_token <= 0:
        raise ConfigError(f"{field}={text!r}: must be more than 0 seconds")
    return lambda output_tokens: base + per_token * output_tokens
