"""The fewest replicas with which a workload keeps its objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aioengine.checks import Count, check_value, nearest
from aioengine.errors import ConfigError
from aioengine.lab.analysis.statistics import Estimate, estimate
from aioengine.lab.runs.experiment import OF_A_FLEET, Experiment
from aioengine.lab.runs.pool import Task, run_all

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
MORE_SEEDS = 3
"""Factor on the number of seeds where a bound is within an interval."""


class Objective(NamedTuple):
    """One figure of a run, and the bound that it must keep: a share at least, or seconds at most."""

    name: str
    bound: float

    def of(self, summary: Mapping[str, Any]) -> float:
        """Return the figure in a run's summary; infinite (a share: 0) if nothing was served."""
        if self.name == "goodput":
            return float(summary["slo"]["in_time_share"] or 0.0)
        if self.name == "served":
            offered = summary["requests_offered"]
            return float(summary["requests_finished"]) / offered if offered else 1.0
        group, _, of = self.name.rpartition("_")
        value = summary[TIMES[group]][of]
        if value is None:
            return 0.0 if summary["requests_finished"] else math.inf
        return float(value)

    def verdict(self, found: Estimate) -> bool | None:
        """Whether the whole interval over the seeds keeps the bound; None: the bound is in the interval."""
        ends = {
            end >= self.bound if self.name in SHARES else end <= self.bound
            for end in (found.mean if end is None else end for end in (found.low, found.high))
        }
        return ends.pop() if len(ends) == 1 else None

    def text(self, found: Estimate) -> str:
        """ "ttft_p99 = 1.92 (1.70 .. 2.14) s, at most 2 s" """
        unit, scale, sign = ("%", 100.0, "at least") if self.name in SHARES else (" s", 1.0, "at most")
        interval = ""
        if found.low is not None and found.high is not None and found.high - found.low > 1e-9:
            interval = f" ({found.low * scale:.3g} .. {found.high * scale:.3g})"
        clear = "" if self.verdict(found) is not None else " (not clear)"
        bound = f"{sign} {self.bound * scale:g}{unit}"
        return f"{self.name} = {found.mean * scale:.3g}{interval}{unit}, {bound}{clear}"


def parse_objectives(texts: Iterable[str]) -> list[Objective]:
    """Parse objectives from texts such as "ttft_p99=2.0" or "ttft_p99=2.0,itl_p95=0.05", with ``served``
    added.

    Raises ConfigError for an unknown name, or a bound out of range.
    """
    known = [*SHARES, *(f"{name}_{of}" for name in TIMES for of in OF)]
    found: dict[str, float] = {"served": SERVED}
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
        found[name] = bound
    return [Objective(name, bound) for name, bound in found.items()]


class Trial(NamedTuple):
    """Result for a number of replicas."""

    replicas: int
    figures: dict[str, Estimate]
    """Figures by objective; empty if it cannot be run."""
    holds: bool | None
    """Whether the objectives hold. None: a bound is within an interval over all seeds, which counts as not
    holding."""
    error: str = ""
    """Why it cannot be run."""


@dataclass
class Sizing:
    """A search for the fewest replicas.

    A number holds if the 95% interval over the seeds of every objective keeps its bound. If a bound is within
    the interval, seeds are added, up to ``MORE_SEEDS`` times as many. All get the same arrivals. More
    replicas are taken to be never worse.

    Raises ConfigError if the experiment changes the number of replicas by itself.
    """

    experiment: Experiment
    """The workload, and all other settings."""
    objectives: Sequence[Objective]
    out: Path
    """A folder for the runs, below ``runs``."""
    seeds: int = 3
    jobs: int = 1
    tried: Callable[[Trial], None] = lambda trial: None
    """Told of each trial."""
    trials: dict[int, Trial] = field(default_factory=dict)
    """All that were tried, by replicas."""

    def __post_init__(self) -> None:
        check_value("seeds", self.seeds, Count)
        if (value := self.experiment.autoscale) is not None:
            raise ConfigError(f"autoscale={value!r}: a size has as many replicas all the time; leave it out")
        spec = self.experiment.workload
        if any(one.name == "goodput" for one in self.objectives) and not (spec.slo or spec.deadline):
            raise ConfigError("slo goodput: the workload says not by when requests should end; give it slo")

    def find(self, least: int, most: int) -> int | None:
        """Return the fewest replicas that hold; None if none does. One less was tried, if it may be."""
        failed, count = least - 1, least
        while not self._holds(count):
            if count == most:
                return None
            failed, count = count, min(count * 2, most)
        while count - failed > 1:
            middle = (failed + count) // 2
            failed, count = (failed, middle) if self._holds(middle) else (middle, count)
        return count

    def _holds(self, replicas: int) -> bool:
        """Try a number of replicas, with more seeds while a bound is within an interval."""
        if replicas not in self.trials:
            trial, summaries = Trial(replicas, {}, None), list[dict[str, Any]]()
            while trial.holds is None and len(summaries) < self.seeds * MORE_SEEDS:
                found = self._run(replicas, range(len(summaries), len(summaries) + self.seeds))
                if isinstance(found, str):
                    trial = Trial(replicas, {}, False, found)
                    break
                summaries += found
                figures = {
                    one.name: estimate([one.of(each) for each in summaries]) for one in self.objectives
                }
                verdicts = {one.verdict(figures[one.name]) for one in self.objectives}
                holds = False if False in verdicts else None if None in verdicts else True
                trial = Trial(replicas, figures, holds)
            self.trials[replicas] = trial
            self.tried(trial)
        return self.trials[replicas].holds is True

    def _run(self, replicas: int, seeds: range) -> list[dict[str, Any]] | str:
        """Return the summaries of runs with these seeds, or why there are none."""
        fields: dict[str, Any] = {"replicas": replicas}
        if replicas == 1:  # without a gateway
            names = {field.name: field.default for field in msgspec.structs.fields(Experiment)}
            fields = {"replicas": None, **{name: names[name] for name in OF_A_FLEET}}
        first, runs = self.experiment.seed, self.out / "runs"
        tasks = [
            Task(
                msgspec.structs.replace(self.experiment, seed=first + seed, **fields),
                runs / f"replicas={replicas}-seed={seed}",
            )
            for seed in seeds
        ]
        found = []
        for summary, error in run_all(tasks, self.jobs):
            if summary is None:
                return str(error)
            if not summary["policy"]["valid"]:
                return f"the policy did not decide every step: {summary['policy']['reason']}"
            found.append(summary)
        return found
