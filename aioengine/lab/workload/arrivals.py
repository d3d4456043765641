"""Arrival processes: when requests come.

Times are whole microseconds. Each gap is rounded, so that differences in the last bit between mathematical
libraries do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import pi, sin
from random import Random
from typing import Annotated

from msgspec import Meta

from aioengine.lab.workload.forms import Form, parse_form
from aioengine.lab.workload.random_streams import exponential, gamma

Rate = Annotated[float, Meta(gt=0, le=1e5)]
"""Requests a second."""
Spell = Annotated[float, Meta(ge=1e-3)]
"""Seconds."""


class ArrivalProcess(Form):
    """Process with a mean rate; poisson: independent arrivals."""

    rate: Rate

    def times(self, rng: Random, scale: float = 1.0) -> Iterator[int]:
        """Yield arrivals without end, in microseconds from the start; ``scale`` multiplies the rate."""
        now = 0
        while True:
            now += self.gap(rng, self.rate * scale)
            yield now

    def gap(self, rng: Random, rate: float) -> int:
        """Draw the microseconds between two arrivals."""
        return _microseconds(exponential(rng) / rate)


class Gamma(ArrivalProcess):
    """Process whose gaps have a Gamma distribution with the coefficient of variation ``cv``: 1 is Poisson,
    more is burstier. As in S-LoRA (arXiv 2311.03285): shape 1/cv^2, scale cv^2/rate."""

    cv: Annotated[float, Meta(ge=0.01, le=100)] = 1.0

    def gap(self, rng: Random, rate: float) -> int:
        spread = self.cv * self.cv
        return _microseconds(gamma(rng, 1.0 / spread) * spread / rate)


class OnOff(ArrivalProcess):
    """Bursts: Poisson arrivals for a while, and then none for a while. Both last exponential times, of the
    means ``on`` and ``off`` seconds (the interrupted Poisson process of Kuczura, 1973). It begins with a
    burst."""

    on: Spell
    off: Spell

    def times(self, rng: Random, scale: float = 1.0) -> Iterator[int]:
        now, until = 0, _microseconds(exponential(rng) * self.on)
        while True:
            # A gap that reaches beyond the burst is dropped; exponential gaps have no memory.
            then = now + self.gap(rng, self.rate * scale)
            if then < until:
                now = then
                yield now
            else:
                now = until + _microseconds(exponential(rng) * self.off)
                until = now + _microseconds(exponential(rng) * self.on)


class Diurnal(ArrivalProcess):
    """Rate that follows a sine around ``rate`` with amplitude ``depth * rate`` and ``period`` seconds; it
    begins at the mean and rises. Drawn by thinning (Lewis and Shedler, 1979)."""

    period: Spell = 86_400.0
    depth: Annotated[float, Meta(ge=0, le=1)] = 0.8

    def times(self, rng: Random, scale: float = 1.0) -> Iterator[int]:
        highest, turns = 1.0 + self.depth, 2.0 * pi / (self.period * 1e6)
        for now in super().times(rng, scale * highest):
            if rng.random() * highest < 1.0 + self.depth * sin(turns * now):
                yield now


FORMS: dict[str, type[ArrivalProcess]] = {
    "poisson": ArrivalProcess,
    "gamma": Gamma,
    "onoff": OnOff,
    "diurnal": Diurnal,
}


def parse_arrivals(field: str, text: str) -> ArrivalProcess:
    """Parse "poisson:rate=2", "gamma:rate=2,cv=4", "onoff:rate=2,on=10,off=30" or
    "diurnal:rate=2,period=86400,depth=0.8": rates in requests a second. Raises ConfigError."""
    return parse_form(field, text, FORMS)


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
