"""The smallest number of replicas, slots and CPU cache places with which a workload keeps its objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from aioengine.checks import Count, check_value, format_bytes
from aioengine.errors import AioEngineError, ConfigError
from aioengine.lab.analysis.statistics import Estimate, estimate
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.runs.experiment import OF_A_FLEET, Experiment
from aioengine.lab.runs.pool import Report, Task, run_all
from aioengine.lab.runs.simulate import run
from aioengine.lab.sizing.objectives import Objective, with_p95
from aioengine.memory_plan import MemoryPlan

SLOT_LADDER = 4
"""Numbers of slots that are tried with a number of replicas: the largest that makes sense, then half of it,
and so on, because slots take memory from the KV cache."""


MEMORY_PARTS = 16
"""Parts of the given ``slot_memory`` that are tried."""
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
    slot_memory: int | None = None
    """Bytes that a replica's slots share; None: slots of a fixed size."""

    def __str__(self) -> str:
        slots = f"{self.slots} slots"
        if self.slot_memory is not None:
            slots += f" in {format_bytes(self.slot_memory)}"
        return f"{self.replicas} replicas, {slots}, {self.cpu_loras} adapters in CPU memory"


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
    """For each of "replicas", "slots", "cpu_loras" and "slot_memory" the next smaller size, which was tried
    and does not hold the objectives; None if there is none, or if it was fixed."""

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
    bounds: Bounds | None = None,
    seeds: int = 3,
    most_seeds: int = 9,
    jobs: int = 1,
    tried: Callable[[Trial], None] = lambda trial: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Sized:
    """Search the smallest size: first replicas, then slots, then places in the CPU cache, and last, where the
    experiment's ``slot_memory`` is a number of bytes, how many sixteenths of it.

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
    for name in ("faults", "autoscale"):
        if (value := getattr(experiment, name)) is not None:
            raise ConfigError(f"{name}={value!r}: a size has as many replicas all the time; leave it out")
    check_value("most_seeds", most_seeds, Annotated[int, Meta(ge=seeds)])
    if any(objective.name == "goodput" for objective in objectives):
        spec = experiment.workload
        if spec.slo is None and spec.timeout is None and spec.deadline is None:
            raise ConfigError("slo goodput: the workload says not by when requests should end; give it slo")
    trials = _Trials(experiment, objectives, out, seeds, most_seeds, jobs, tried, stopping)
    return _search(experiment, trials, bounds or Bounds())


def _search(experiment: Experiment, trials: _Trials, bounds: Bounds) -> Sized:
    adapters = max(len(experiment.open_workload().adapters), 1)
    slots = bounds.slots or (1, _most_slots(experiment, adapters))
    lora = experiment.engine_config().lora
    memory = lora.slot_memory if lora is not None and isinstance(lora.slot_memory, int) else None
    less: dict[str, Trial | None] = {"replicas": None, "slots": None, "cpu_loras": None}

    def with_replicas(count: int) -> Size | None:
        """Return a size with this number of replicas that holds, of those with ever fewer slots."""
        at = slots[1]
        for _ in range(SLOT_LADDER):
            size = Size(count, at, max(at, bounds.cpu_loras[1] if bounds.cpu_loras else adapters), memory)
            trial = trials.of(size)
            if trial.holds:
                return size
            if at == slots[1]:
                less["replicas"] = trial
            if at == slots[0]:
                return None
            at = max(at // 2, slots[0])
        return None

    def lowered(size: Size, name: str, low: int, high: int, change: Callable[[int], Size]) -> Size:
        """Return the least of one dimension that still holds, between ``low`` and ``high``, which does."""

        def holds(number: int) -> Size | None:
            trial = trials.of(change(number))
            if not trial.holds:
                less[name] = trial
            return trial.size if trial.holds else None

        return _least(low, high, holds) or size

    low, most = bounds.replicas
    count, found = low, with_replicas(low)
    failed = low - 1
    while found is None and count < most:
        failed, count = count, min(count * 2, most)
        found = with_replicas(count)
    if found is None:
        return Sized(None, trials.in_order, {})
    found = _least(failed + 1, count, with_replicas) or found
    size = lowered(found, "slots", slots[0], found.slots, lambda n: found._replace(slots=n))
    least = max(size.slots, bounds.cpu_loras[0] if bounds.cpu_loras else 1)
    size = lowered(size, "cpu_loras", least, size.cpu_loras, partial(_with_cpu_loras, size))
    if memory is not None:
        less["slot_memory"] = None
        size = lowered(size, "slot_memory", 1, MEMORY_PARTS, partial(_with_memory, size, memory))
    return Sized(size, trials.in_order, less)


def _with_cpu_loras(size: Size, count: int) -> Size:
    return size._replace(cpu_loras=count)


def _with_memory(size: Size, memory: int, part: int) -> Size:
    return size._replace(slot_memory=memory * part // MEMORY_PARTS)


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

    def plan(slots: int) -> MemoryPlan:
        fewer = msgspec.structs.replace(experiment, slots=slots, cpu_loras=max(adapters, slots), **ALONE)
        return costs.plan(fewer.engine_config())

    fits, failed = 0, adapters + 1
    while failed - fits > 1:
        middle = (failed + fits) // 2
        try:
            plan(middle)
            fits = middle
        except ConfigError:
            failed = middle
    if not fits:
        plan(1)
    return max(fits, 1)


class _Trials:
    """The sizes that were tried, each once."""

    def __init__(
        self,
        experiment: Experiment,
        objectives: Sequence[Objective],
        out: Path,
        seeds: int,
        most_seeds: int,
        jobs: int,
        tried: Callable[[Trial], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._experiment = experiment
        self._objectives = objectives
        self._out = out
        self._seeds = seeds
        self._most_seeds = most_seeds
        self._jobs = jobs
        self._tried = tried
        self._stopping = stopping
        self._known: dict[Size, Trial] = {}

    @property
    def in_order(self) -> list[Trial]:
        return list(self._known.values())

    def of(self, size: Size) -> Trial:
        """Try a size, with more seeds while a bound is within an interval."""
        if size in self._known:
            return self._known[size]
        summaries: list[dict[str, Any]] = []
        trial = Trial(size, {}, None, 0, {})
        while trial.holds is None and len(summaries) < self._most_seeds:
            count = min(self._seeds, self._most_seeds - len(summaries))
            try:
                summaries += self._run(size, range(len(summaries), len(summaries) + count))
            except AioEngineError as error:
                trial = trial._replace(holds=False, error=str(error))
                break
            trial = self._judge(size, summaries)
        self._known[size] = trial
        self._tried(trial)
        return trial

    def _judge(self, size: Size, summaries: Sequence[dict[str, Any]]) -> Trial:
        figures = {o.name: estimate([o.of(summary) for summary in summaries]) for o in self._objectives}
        verdicts = [objective.verdict(figures[objective.name]) for objective in self._objectives]
        holds = False if False in verdicts else None if None in verdicts else True
        use = {
            name: fmean([summary[group][figure] or 0.0 for summary in summaries])
            for name, (group, figure) in USE.items()
        }
        use["sequences"] /= self._experiment.max_num_seqs * size.replicas
        return Trial(size, figures, holds, len(summaries), use)

    def _run(self, size: Size, seeds: range) -> list[dict[str, Any]]:
        name = f"replicas={size.replicas}-slots={size.slots}-cpu={size.cpu_loras}"
        if size.slot_memory is not None:
            name += f"-bytes={size.slot_memory}"
        tasks = [
            Task(seed, self._experiment_of(size, seed), self._out / "runs" / f"{name}-seed={seed}")
            for seed in seeds
        ]
        ended: dict[int, Report] = {}

        def hear(report: Report) -> None:
            if report.kind != "progress":
                ended[report.key] = report

        if self._jobs == 1:
            for task in tasks:
                if self._stopping():
                    raise KeyboardInterrupt
                hear(Report(task.key, "done", summary=run(task.experiment, task.out).summary))
        else:
            run_all(tasks, self._jobs, hear, self._stopping)
        found = []
        for task in tasks:
            report = ended[task.key]
            if report.summary is None:
                raise ConfigError(report.error or "the run failed")
            policy = report.summary["policy"]
            if not policy["valid"]:
                raise ConfigError(f"the policy did not decide every step: {policy['reason']}")
            found.append(with_p95(report.summary, task.out))
        return found

    def _experiment_of(self, size: Size, seed: int) -> Experiment:
        several: Mapping[str, Any] = ALONE if size.replicas == 1 else {"replicas": size.replicas}
        if size.slot_memory is not None:
            several = {**several, "slot_memory": size.slot_memory}
        return msgspec.structs.replace(
            self._experiment,
            slots=size.slots,
            cpu_loras=size.cpu_loras,
            seed=self._experiment.seed + seed,
            **several,
        )
