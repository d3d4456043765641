"""Objectives of a service, as text: "ttft_p99=2.0", "itl_p95=0.05", "goodput=0.95"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.lab.analysis.statistics import Estimate
from aioengine.lab.analysis.summary import times_of
from aioengine.lab.runs.rows import load_frames

TIMES = {
    "ttft": "ttft_seconds",
    "itl": "inter_token_seconds",
    "gap": "worst_gap_seconds",
    "latency": "latency_seconds",
    "queue": "queue_seconds",
}
"""Groups of a summary's figures, by the names of objectives."""
OF = ("mean", "p50", "p90", "p95", "p99", "max")
SHARES = ("goodput", "served")
SERVED = 0.99
"""Default share of requests that must be served. Otherwise a policy that rejects most requests would be the
fastest."""


def with_p95(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a run's summary with 95th percentiles, which are computed from its files."""
    times = times_of(load_frames(folder).requests)
    p95 = {group: times[group].drop_nulls().quantile(0.95, "linear") for group in TIMES.values()}
    return {**summary, **{group: {**summary[group], "p95": value} for group, value in p95.items()}}


class Objective(NamedTuple):
    """One figure of a run, and the bound that it must keep."""

    name: str
    bound: float

    @property
    def is_share(self) -> bool:
        """Whether the bound is a minimum share, not a maximum number of seconds."""
        return self.name in SHARES

    def of(self, summary: Mapping[str, Any]) -> float:
        """Return the figure in a run's summary; infinite (a share: 0) if nothing was served."""
        if self.name == "goodput":
            asked = summary["slo"]["requests_with_deadline"]
            return float(summary["slo"]["requests_in_time"]) / asked if asked else 0.0
        if self.name == "served":
            offered = summary["requests_offered"]
            return float(summary["requests_finished"]) / offered if offered else 1.0
        group, _, of = self.name.rpartition("_")
        value = summary[TIMES[group]][of]
        if value is None:
            return 0.0 if summary["requests_finished"] else math.inf
        return float(value)

    def holds(self, value: float) -> bool:
        """Whether this value keeps the bound."""
        return value >= self.bound if self.is_share else value <= self.bound

    def verdict(self, found: Estimate) -> bool | None:
        """Whether the bound holds for the whole interval over the seeds; None: the bound is in the
        interval."""
        ends = {self.holds(found.mean if end is None else end) for end in (found.low, found.high)}
        return self.holds(found.mean) if len(ends) == 1 else None

    def text(self, found: Estimate) -> str:
        """ "ttft_p99 = 1.92 (1.70 .. 2.14) s, at most 2 s" """
        unit, scale, sign = ("%", 100.0, "at least") if self.is_share else (" s", 1.0, "at most")
        interval = ""
        if found.low is not None and found.high is not None and found.high - found.low > 1e-9:
            interval = f" ({found.low * scale:.3g} .. {found.high * scale:.3g})"
        return f"{self.name} = {found.mean * scale:.3g}{interval}{unit}, {sign} {self.bound * scale:g}{unit}"


def parse_objectives(texts: Iterable[str]) -> list[Objective]:
    """Parse objectives from texts such as "ttft_p99=2.0" or "ttft_p99=2.0,itl_p95=0.05", with ``served``
    added.

    Raises ConfigError for an unknown name, or a bound out of range.
    """
    known = [*SHARES, *(f"{name}_{of}" for name in TIMES for of in OF)]
    found: dict[str, float] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, _, number = part.partition("=")
        if name not in known:
            some = "ttft_p99=2.0, itl_p95=0.05, latency_mean=8, goodput=0.95, served=0.99"
            raise ConfigError(f"slo {part!r}: there is no {name!r}{nearest(name, known)}; write, say, {some}")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not 0 < bound <= (1.0 if name in SHARES else 1e12):
            of = "a share > 0 and <= 1" if name in SHARES else "seconds > 0"
            raise ConfigError(f"slo {part!r}: {number!r} must be {of}, as in ttft_p99=2.0")
        if name in found:
            raise ConfigError(f"slo: {name} is given twice")
        found[name] = bound
    found.setdefault("served", SERVED)
    return [Objective(name, bound) for name, bound in found.items()]
