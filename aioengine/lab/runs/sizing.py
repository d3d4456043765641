"""The fewest replicas, and then slots, with which a workload keeps its objectives."""

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
from aioengine.lab.costs.presets import load_costs
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
SLOT_LADDER = 4
"""Numbers of slots that are tried with a number of replicas: the largest that makes sense, then half of it,
and so on, because slots take memory from the KV cache."""
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
        found[name] = bound
    found.setdefault("served", SERVED)
    return [Objective(name, bound) for name, bound in found.items()]


class Size(NamedTuple):
    replicas: int
    slots: int

    def __str__(self) -> str:
        return f"{self.replicas} replicas, {self.slots} slots"


class Trial(NamedTuple):
    """Result for a size."""

    size: Size
    figures: dict[str, Estimate]
    """Figures by objective; empty if the size cannot be run."""
    holds: bool | None
    """Whether the objectives hold. None: a bound is within an interval over all seeds, which counts as not
    holding."""
    seeds: int
    error: str = ""
    """Why it cannot be run."""


@dataclass
class Sizing:
    """A search for the smallest size: first replicas, then slots.

    A size holds if the 95% interval over the seeds of every objective keeps its bound. If a bound is within
    the interval, seeds are added, up to ``MORE_SEEDS`` times as many; if it still is, the size counts as not
    holding. All sizes get the same arrivals. More replicas are taken to be never worse. For slots that is not
    so, and several numbers are tried with each number of replicas.

    Raises ConfigError if the workload cannot be opened, or the experiment changes the number of replicas by
    itself.
    """

    experiment: Experiment
    """The workload, and all settings that are not searched."""
    objectives: Sequence[Objective]
    out: Path
    """A folder for the runs, below ``runs``."""
    seeds: int = 3
    jobs: int = 1
    tried: Callable[[Trial], None] = lambda trial: None
    """Told of each trial."""
    stopping: Callable[[], bool] = lambda: False
    trials: dict[Size, Trial] = field(default_factory=dict)
    """All that were tried, in order."""

    def __post_init__(self) -> None:
        check_value("seeds", self.seeds, Count)
        if (value := self.experiment.autoscale) is not None:
            raise ConfigError(f"autoscale={value!r}: a size has as many replicas all the time; leave it out")
        spec = self.experiment.workload
        if any(one.name == "goodput" for one in self.objectives) and not (spec.slo or spec.deadline):
            raise ConfigError("slo goodput: the workload says not by when requests should end; give it slo")
        self.adapters = max(len(self.experiment.open_workload().adapters), 1)

    def find(self, replicas: tuple[int, int], slots: tuple[int, int] | None = None) -> Size | None:
        """Return the smallest size within these bounds that holds; None if none does. The sizes with one
        replica less, and one slot less, were tried if they are within the bounds. Slots are at most as many
        as there are adapters, by default."""
        least, most = slots or (1, self.adapters)
        steps = dict.fromkeys(max(most >> step, least) for step in range(most.bit_length()))
        ladder = [number for number in steps if self._fits(number)][:SLOT_LADDER] or [least]

        def with_replicas(count: int) -> Size | None:
            return next((size for number in ladder if self._holds(size := Size(count, number))), None)

        failed, count = replicas[0] - 1, replicas[0]
        while (best := with_replicas(count)) is None and count < replicas[1]:
            failed, count = count, min(count * 2, replicas[1])
        if best is None:
            return None
        fewest = _least(failed + 1, count, with_replicas) or best
        return (
            _least(
                least,
                fewest.slots,
                lambda number: size if self._holds(size := Size(fewest.replicas, number)) else None,
            )
            or fewest
        )

    def less(self, size: Size) -> dict[str, Trial | None]:
        """Return, for replicas and for slots, what was tried with one less."""
        fewer = [trial for trial in self.trials.values() if trial.size.replicas == size.replicas - 1]
        return {
            "replicas": fewer[0] if fewer else None,
            "slots": self.trials.get(Size(size.replicas, size.slots - 1)),
        }

    def _of_size(self, size: Size) -> Experiment:
        fields: dict[str, Any] = {"replicas": size.replicas, "slots": size.slots}
        if size.replicas == 1:  # without a gateway
            names = {field.name: field.default for field in msgspec.structs.fields(Experiment)}
            fields |= {"replicas": None, **{name: names[name] for name in OF_A_FLEET}}
        places = max(self.experiment.cpu_loras, size.slots)
        return msgspec.structs.replace(self.experiment, cpu_loras=places, **fields)

    def _fits(self, slots: int) -> bool:
        """Return whether so many slots fit into the device's memory. Raises ConfigError if one does not."""
        try:
            load_costs(self.experiment.preset).plan(self._of_size(Size(1, slots)).engine_config())
            return True
        except ConfigError:
            if slots == 1:
                raise
            return False

    def _holds(self, size: Size) -> bool:
        """Try a size, with more seeds while a bound is within an interval."""
        if size not in self.trials:
            trial, summaries = Trial(size, {}, None, 0), list[dict[str, Any]]()
            while trial.holds is None and len(summaries) < self.seeds * MORE_SEEDS:
                found = self._run(size, range(len(summaries), len(summaries) + self.seeds))
                if isinstance(found, str):
                    trial = trial._replace(holds=False, error=found)
                    break
                summaries += found
                trial = self._judge(size, summaries)
            self.trials[size] = trial
            self.tried(trial)
        return self.trials[size].holds is True

    def _judge(self, size: Size, summaries: Sequence[dict[str, Any]]) -> Trial:
        figures = {one.name: estimate([one.of(summary) for summary in summaries]) for one in self.objectives}
        verdicts = {objective.verdict(figures[objective.name]) for objective in self.objectives}
        holds = False if False in verdicts else None if None in verdicts else True
        return Trial(size, figures, holds, len(summaries))

    def _run(self, size: Size, seeds: range) -> list[dict[str, Any]] | str:
        """Return the summaries of a size with these seeds, or why there are none."""
        experiment = self._of_size(size)
        tasks = [
            Task(
                msgspec.structs.replace(experiment, seed=self.experiment.seed + seed),
                self.out / "runs" / f"replicas={size.replicas}-slots={size.slots}-seed={seed}",
            )
            for seed in seeds
        ]
        found = []
        for summary, error in run_all(tasks, self.jobs, stopping=self.stopping):
            if summary is None:
                return str(error)
            if not summary["policy"]["valid"]:
                return f"the policy did not decide every step: {summary['policy']['reason']}"
            found.append(summary)
        return found


def _least(low: int, high: int, holds: Callable[[int], Size | None]) -> Size | None:
    """Return what the least number below ``high``, which holds, gives that still does, by bisection; None if
    there is none."""
    found = None
    while low < high:
        middle = (low + high) // 2
        size = holds(middle)
        if size is None:
            low = middle + 1
        else:
            found, high = size, middle
    return found
