"""The smallest number of replicas, slots and CPU cache places with which a workload keeps its objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from aioengine.checks import Count, check_value
from aioengine.errors import AioEngineError, ConfigError
from aioengine.lab.analysis.statistics import Estimate, estimate
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.runs.experiment import OF_A_FLEET, Experiment
from aioengine.lab.runs.pool import Report, Task, run_all
from aioengine.lab.runs.simulate import run
from aioengine.lab.sizing.objectives import Objective, with_p95

SLOT_LADDER = 4
"""Numbers of slots that are tried with a number of replicas: the largest that makes sense, then half of it,
and so on, because slots take memory from the KV cache."""
ALONE: Mapping[str, Any] = {"replicas": None, **dict.fromkeys(OF_A_FLEET)}
"""Fields of an experiment without a fleet."""
USE = {
    "device": ("engine", "stepping_share"),
    "sequences": ("engine", "mean_running"),
    "kv_cache": ("engine", "mean_kv_used_share"),
    "found_in_slot": ("hits", "slot_share"),
    "found_on_disk": ("hits", "disk_share"),
}
"""Use of the resources: groups and names of figures."""


class Size(NamedTuple):
    """Number of replicas, slots and places in the CPU cache."""

    replicas: int
    slots: int
    cpu_loras: int
    """Adapters in each replica's CPU cache, those in slots included."""

    def __str__(self) -> str:
        return f"{self.replicas} replicas, {self.slots} slots, {self.cpu_loras} adapters in CPU memory"


class Trial(NamedTuple):
    """Result for a size."""

    size: Size
    figures: dict[str, Estimate]
    """Figures by objective; empty if the size cannot be run."""
    holds: bool | None
    """Whether the objectives hold. None: a bound is within an interval over all seeds, which counts as not
    holding."""
    seeds: int
    use: dict[str, float]
    """Use of the device: shares between 0 and 1, means over the seeds."""
    error: str = ""
    """Why it cannot be run, for example because it does not fit into memory."""


class Sized(NamedTuple):
    """The answer."""

    size: Size | None
    """Smallest size that holds the objectives; None: none does."""
    trials: list[Trial]
    """All trials, in order."""
    neighbours: dict[str, Trial | None]
    """For each of "replicas", "slots" and "cpu_loras" the next smaller size, which was tried and does not
    hold the objectives; None if there is none, or if it was fixed."""

    def trial(self, size: Size) -> Trial:
        return next(trial for trial in self.trials if trial.size == size)


class Bounds(NamedTuple):
    """Bounds of the search; equal bounds fix a dimension."""

    replicas: tuple[int, int] = (1, 16)
    slots: tuple[int, int] | None = None
    """None: from 1 to as many as there are adapters, or fit into memory."""
    cpu_loras: tuple[int, int] | None = None
    """None: from the slots to as many as there are adapters."""


def find_size(
    experiment: Experiment,
    objectives: Sequence[Objective],
    out: Path,
    *,
    bounds: Bounds = Bounds(),  # noqa: B008 # a tuple
    seeds: int = 3,
    most_seeds: int = 9,
    jobs: int = 1,
    tried: Callable[[Trial], None] = lambda trial: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Sized:
    """Search the smallest size: first replicas, then slots, then places in the CPU cache.

    A size holds if the 95% interval over the seeds of every objective keeps its bound. If a bound is within
    the interval, seeds are added up to ``most_seeds``; if it still is, the size counts as not holding. All
    sizes get the same arrivals. The search assumes that more replicas or CPU cache places are never worse.
    For slots it does not, and tries several numbers with each number of replicas. The sizes with one less in
    a dimension were run, and do not hold.

    Args:
        experiment: The workload, and all settings that are not searched.
        out: A folder for the runs, below ``runs``.
        jobs: Runs at a time, each in a process of its own; one is done in this process.
        tried: Told of each trial.

    Raises:
        ConfigError: The workload cannot be opened, a bound is out of range, or the experiment changes the
            number of replicas by itself.
    """
    check_value("seeds", seeds, Count)
    check_value("most_seeds", most_seeds, Annotated[int, Meta(ge=seeds)])
    for name in ("faults", "autoscale"):
        if (value := getattr(experiment, name)) is not None:
            raise ConfigError(f"{name}={value!r}: a size has as many replicas all the time; leave it out")
    spec = experiment.workload
    judged_by_time = spec.slo or spec.timeout or spec.deadline
    if any(objective.name == "goodput" for objective in objectives) and not judged_by_time:
        raise ConfigError("slo goodput: the workload says not by when requests should end; give it slo")
    adapters = max(len(experiment.open_workload().adapters), 1)
    slots = bounds.slots or (1, _most_slots(experiment, adapters))
    places = bounds.cpu_loras or (1, adapters)
    trials = _Trials(experiment, objectives, out, seeds, most_seeds, jobs, tried, stopping)
    less: dict[str, Trial | None] = dict.fromkeys(Size._fields)

    def with_replicas(count: int) -> Size | None:
        """Return a size with this number of replicas that holds, of those with ever fewer slots."""
        ladder = dict.fromkeys(max(slots[1] >> step, slots[0]) for step in range(SLOT_LADDER))
        of_ladder = (trials.of(Size(count, at, max(at, places[1]))) for at in ladder)
        first = next(of_ladder)
        holding = first if first.holds else next((trial for trial in of_ladder if trial.holds), None)
        if holding is None or holding is not first:
            less["replicas"] = first
        return None if holding is None else holding.size

    def lowered(size: Size, name: str, low: int) -> Size:
        """Return the size with the least of one dimension, ``low`` or more, that still holds."""

        def with_fewer(number: int) -> Size | None:
            trial = trials.of(size._replace(**{name: number}))
            if not trial.holds:
                less[name] = trial
            return trial.size if trial.holds else None

        return _least(low, getattr(size, name), with_fewer) or size

    count, most = bounds.replicas
    failed = count - 1
    size = with_replicas(count)
    while size is None and count < most:
        failed, count = count, min(count * 2, most)
        size = with_replicas(count)
    if size is None:
        return Sized(None, trials.in_order, {})
    size = _least(failed + 1, count, with_replicas) or size
    size = lowered(size, "slots", slots[0])
    size = lowered(size, "cpu_loras", max(size.slots, places[0]))
    return Sized(size, trials.in_order, less)


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


def _most_slots(experiment: Experiment, adapters: int) -> int:
    """Return the largest number of slots that makes sense: as many as there are adapters, or as fit into
    memory. Raises ConfigError if one does not."""
    costs = load_costs(experiment.preset)

    def fits(slots: int) -> bool:
        fewer = msgspec.structs.replace(experiment, slots=slots, cpu_loras=max(adapters, slots), **ALONE)
        try:
            costs.plan(fewer.engine_config())
            return True
        except ConfigError:
            if slots == 1:
                raise
            return False

    low, high = 1, adapters + 1
    fits(1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass
class _Trials:
    """The sizes that were tried, each once."""

    experiment: Experiment
    objectives: Sequence[Objective]
    out: Path
    seeds: int
    most_seeds: int
    jobs: int
    tried: Callable[[Trial], None]
    stopping: Callable[[], bool]
    known: dict[Size, Trial] = field(default_factory=dict)

    @property
    def in_order(self) -> list[Trial]:
        return list(self.known.values())

    def of(self, size: Size) -> Trial:
        """Try a size, with more seeds while a bound is within an interval."""
        if size in self.known:
            return self.known[size]
        summaries: list[dict[str, Any]] = []
        trial = Trial(size, {}, None, 0, {})
        while trial.holds is None and len(summaries) < self.most_seeds:
            last = min(len(summaries) + self.seeds, self.most_seeds)
            try:
                summaries += self._run(size, range(len(summaries), last))
            except AioEngineError as error:
                trial = trial._replace(holds=False, error=str(error))
                break
            trial = self._judge(size, summaries)
        self.known[size] = trial
        self.tried(trial)
        return trial

    def _judge(self, size: Size, summaries: Sequence[dict[str, Any]]) -> Trial:
        figures = {one.name: estimate([one.of(summary) for summary in summaries]) for one in self.objectives}
        verdicts = {objective.verdict(figures[objective.name]) for objective in self.objectives}
        holds = False if False in verdicts else None if None in verdicts else True
        use = {
            name: fmean([summary[group][figure] or 0.0 for summary in summaries])
            for name, (group, figure) in USE.items()
        }
        use["sequences"] /= self.experiment.max_num_seqs * size.replicas
        return Trial(size, figures, holds, len(summaries), use)

    def _run(self, size: Size, seeds: range) -> list[dict[str, Any]]:
        several: Mapping[str, Any] = ALONE if size.replicas == 1 else {"replicas": size.replicas}
        fields = {**size._asdict(), **several}
        tasks = []
        for seed in seeds:
            one = msgspec.structs.replace(self.experiment, seed=self.experiment.seed + seed, **fields)
            name = f"replicas={size.replicas}-slots={size.slots}-cpu={size.cpu_loras}-seed={seed}"
            tasks.append(Task(seed, one, self.out / "runs" / name))
        ended: dict[int, Report] = {}

        def hear(report: Report) -> None:
            if report.kind != "progress":
                ended[report.key] = report

        if self.jobs > 1:
            run_all(tasks, self.jobs, hear, self.stopping)
        else:
            for task in tasks:
                if self.stopping():
                    raise KeyboardInterrupt
                hear(Report(task.key, "done", summary=run(task.experiment, task.out).summary))
        found = []
        for task in tasks:
            summary = ended[task.key].summary
            if summary is None:
                raise ConfigError(ended[task.key].error or "the run failed")
            if not summary["policy"]["valid"]:
                raise ConfigError(f"the policy did not decide every step: {summary['policy']['reason']}")
            found.append(with_p95(summary, task.out))
        return found
