"""Arrival processes: when requests come.

Times are whole microseconds. Each gap is rounded, so that differences in the last bit between mathematical
libraries do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
ArrivalProcess = Callable[[Random], Iterator[int]]
"""Gives arrivals without end: microseconds from the start, none before the last."""


def parse_arrivals(field: str, text: str, *, scale: float = 1.0) -> ArrivalProcess:
    """Parse "poisson:rate=2", "gamma:rate=2,cv=4", "onoff:rate=2,on=10,off=30",
    "diurnal:rate=2,period=86400,depth=0.8": rates in requests a second; ``scale`` multiplies them. Raises
    ConfigError."""
    name, values = parse_form(field, text, FORMS)
    values["rate"] *= scale
    processes: dict[str, Callable[..., Iterator[int]]] = {
        "poisson": _poisson,
        "gamma": _gamma,
        "onoff": _on_off,
        "diurnal": _diurnal,
    }
    return lambda rng: processes[name](rng, **values)


def _poisson(rng: Random, rate: float) -> Iterator[int]:
    """Yield independent arrivals."""
    now = 0
    while True:
        now += _microseconds(exponential(rng) / rate)
        yield now


def _gamma(rng: Random, rate: float, cv: float) -> Iterator[int]:
    """Yield arrivals whose gaps have a Gamma distribution with the coefficient of variation ``cv``: 1 is
    Poisson, more is burstier. As in S-LoRA (arXiv 2311.03285): shape 1/cv^2, scale cv^2/rate."""
    spread, now = cv * cv, 0
    while True:
        now += _microseconds(gamma(rng, 1.0 / spread) * spread / rate)
        yield now


def _on_off(rng: Random, rate: float, on: float, off: float) -> Iterator[int]:
    """Yield bursts: Poisson arrivals for a while, and then none for a while. Both last exponential times, of
    the means ``on`` and ``off`` seconds (the interrupted Poisson process of Kuczura, 1973). It begins with a
    burst."""
    now = 0
    until = _microseconds(exponential(rng) * on)
    while True:
        # A gap that reaches beyond the burst is dropped; exponential gaps have no memory.
        then = now + _microseconds(exponential(rng) / rate)
        if then < until:
            now = then
            yield now
        else:
            now = until + _microseconds(exponential(rng) * off)
            until = now + _microseconds(exponential(rng) * on)


def _diurnal(rng: Random, rate: float, period: float, depth: float) -> Iterator[int]:
    """Yield arrivals with a rate that follows a sine around ``rate`` with amplitude ``depth * rate`` and
    ``period`` seconds; it begins at the mean and rises. Drawn by thinning (Lewis and Shedler, 1979)."""
    highest, turns, now = 1.0 + depth, 2.0 * pi / (period * 1e6), 0
    while True:
        now += _microseconds(exponential(rng) / (rate * highest))
        if rng.random() * highest < 1.0 + depth * sin(turns * now):
            yield now


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
