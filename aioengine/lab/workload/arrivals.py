"""Arrival processes: when requests come.

Times are whole microseconds. Each gap is rounded, so that differences in the last bit between mathematical
libraries do not add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import pi, sin
from random import Random

from aioengine.lab.workload.random_streams import exponential, gamma
from aioengine.lab.workload.spec_text import Option, parse_form

_RATE = Option(high=1e5)
FORMS = {
    "poisson": {"rate": _RATE},
    "gamma": {"rate": _RATE, "cv": Option(1.0, low=0.01, high=100.0, above=False)},
    "onoff": {"rate": _RATE, "on": Option(low=1e-3, above=False), "off": Option(low=1e-3, above=False)},
    "diurnal": {
        "rate": _RATE,
        "period": Option(86_400.0, low=1e-3, above=False),
        "depth": Option(0.8, high=1.0, above=False),
    },
}


class ArrivalProcess(ABC):
    """``rate`` is in requests a second."""

    @abstractmethod
    def times(self, rng: Random) -> Iterator[int]:
        """Arrivals without end: microseconds from the start, none before the last."""


class Poisson(ArrivalProcess):
    """Independent arrivals."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def times(self, rng: Random) -> Iterator[int]:
        now = 0
        while True:
            now += _microseconds(exponential(rng) / self.rate)
            yield now


class GammaArrivals(ArrivalProcess):
    """Gaps with a Gamma distribution and the coefficient of variation ``cv``: 1 is Poisson, more is burstier.
    As in S-LoRA (arXiv 2311.03285): shape 1/cv^2, scale cv^2/rate."""

    def __init__(self, rate: float, cv: float) -> None:
        self.rate = rate
        self.cv = cv

    def times(self, rng: Random) -> Iterator[int]:
        spread = self.cv * self.cv
        now = 0
        while True:
            now += _microseconds(gamma(rng, 1.0 / spread) * spread / self.rate)
            yield now


class OnOff(ArrivalProcess):
    """Bursts: Poisson arrivals at ``rate`` for a while, and then none for a while. Both last exponential
    times, of the means ``on`` and ``off`` seconds (the interrupted Poisson process of Kuczura, 1973).
    It begins with a burst."""

    def __init__(self, rate: float, on: float, off: float) -> None:
        self.rate = rate
        self.on = on
        self.off = off

    def times(self, rng: Random) -> Iterator[int]:
        now = 0
        until = _microseconds(exponential(rng) * self.on)
        while True:
            # A gap that reaches beyond the burst is dropped; exponential gaps have no memory.
            then = now + _microseconds(exponential(rng) / self.rate)
            if then < until:
                now = then
                yield now
            else:
                now = until + _microseconds(exponential(rng) * self.off)
                until = now + _microseconds(exponential(rng) * self.on)


class Diurnal(ArrivalProcess):
    """Arrivals with a rate that follows a sine around ``rate`` with amplitude ``depth * rate`` and ``period``
    seconds; it begins at the mean and rises. Drawn by thinning (Lewis and Shedler, 1979)."""

    def __init__(self, rate: float, period: float, depth: float) -> None:
        self.rate = rate
        self.period = period
        self.depth = depth

    def times(self, rng: Random) -> Iterator[int]:
        highest = 1.0 + self.depth
        turns = 2.0 * pi / (self.period * 1e6)
        now = 0
        while True:
            now += _microseconds(exponential(rng) / (self.rate * highest))
            if rng.random() * highest < 1.0 + self.depth * sin(turns * now):
                yield now


def parse_arrivals(field: str, text: str, *, scale: float = 1.0) -> ArrivalProcess:
    """Parse "poisson:rate=2", "gamma:rate=2,cv=4", "onoff:rate=2,on=10,off=30",
    "diurnal:rate=2,period=86400,depth=0.8"; ``scale`` multiplies the rate. Raises ConfigError."""
    name, values = parse_form(field, text, FORMS)
    values["rate"] *= scale
    match name:
        case "poisson":
            return Poisson(**values)
        case "gamma":
            return GammaArrivals(**values)
        case "onoff":
            return OnOff(**values)
        case _:
            return Diurnal(**values)


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
