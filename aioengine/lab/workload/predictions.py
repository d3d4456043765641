"""Information for policies: how long a request's output will be, and by when it must have ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class Told(NamedTuple):
    """An output's length, and what policies know of it."""

    output_tokens: int
    max_tokens: int | None
    expected_tokens: int | None


class LengthView(ABC):
    """Knowledge that policies have of an output's length."""

    @abstractmethod
    def tell(self, output_tokens: int, rng: Random) -> Told:
        """Return the prediction for an output of this length. It is at most ``max_tokens``."""


class Known(LengthView):
    """Everything: ``max_tokens`` is the length."""

    def tell(self, output_tokens: int, rng: Random) -> Told:
        return Told(output_tokens, None, None)


class Hidden(LengthView):
    """Nothing: ``max_tokens`` is the same for all."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def tell(self, output_tokens: int, rng: Random) -> Told:
        return Told(min(output_tokens, self.max_tokens), self.max_tokens, None)


class Predicted(LengthView):
    """A prediction, wrong by a factor whose logarithm is normal with the deviation ``error``. With 0.5 it is
    within a factor of 1.65 two times out of three."""

    def __init__(self, error: float, max_tokens: int) -> None:
        self.error = error
        self.max_tokens = max_tokens

    def tell(self, output_tokens: int, rng: Random) -> Told:
        length = min(output_tokens, self.max_tokens)
        guess = min(log_normal(rng, length, self.error), self.max_tokens)
        return Told(length, self.max_tokens, max(round(guess), 1))


class Deadlines(NamedTuple):
    """``base`` seconds, and ``per_token`` more for each token of the output."""

    base: float
    per_token: float

    def of(self, output_tokens: int) -> float:
        """Return the seconds from arrival."""
        return self.base + self.per_token * output_tokens


def parse_view(field: str, text: str) -> LengthView:
    """Parse "known", "hidden:max=4096" or "predicted:error=0.5,max=4096". Raises ConfigError."""
    name, values = parse_form(field, text, FORMS)
    match name:
        case "known":
            return Known()
        case "hidden":
            return Hidden(int(values["max"]))
        case _:
            return Predicted(values["error"], int(values["max"]))


def parse_deadline(field: str, value: float | str) -> Deadlines:
    """Parse seconds, or "proportional:0.5+0.05" (for each request, and for each token). Raises
    ConfigError."""
    text = str(value)
    name, colon, rest = text.partition(":")
    if not colon:
        found = Deadlines(parse_number(field, text, text), 0.0)
    else:
        base, plus, token = rest.partition("+")
        if name != "proportional" or not plus:
            raise ConfigError(f"{field}={text!r}: write seconds, or proportional:BASE+PER_TOKEN in seconds")
        found = Deadlines(parse_number(field, text, base), parse_number(field, text, token))
    if min(found) < 0 or found.of(1) <= 0:
        raise ConfigError(f"{field}={text!r}: must be more than 0 seconds")
    return found
