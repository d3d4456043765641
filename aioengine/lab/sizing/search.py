"""The smallest number of replicas, slots and CPU cache places with which a workload keeps its objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aioengine.checks import check_integer, format_bytes
from aioengine.errors import AioEngineError, ConfigError
from aioengine.lab.analysis.statistics import Estimate, estimate
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.runs.experiment import OF_A_FLEET, Experiment
from aioengine.lab.runs.pool import Report, Task, run_all
from aioengine.lab.runs.simulate import run
from aioengine.lab.sizing.objectives import Objective, with_p95

SLOT_LADDER = 4
"""Numbers of slots that are tried with a number of replicas: the largest that makes sense, then half of it,
and so on, because slots take memory from the KV cache."""


MEMORY_PARTS = 16
"""Parts of the given ``slot_memory`` that are tried."""


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
    check_integer("seeds", seeds, low=1)
    for name in ("faults", "autoscale"):
        if (value := getattr(experiment, name)) is not None:
            raise ConfigError(f"{name}={value!r}: a size has as many replicas all the time; leave it out")
    check_integer("most_seeds", most_seeds, low=seeds)
    if any(objective.name == "goodput" for objective in objectives):
        spec = experiment.workload
        if spec.slo is None and spec.timeout is None and spec.deadline is None:
            raise ConfigError("slo goodput: the workload says not by when requests should end; give it slo")
    search = _Search(experiment, objectives, out, seeds, most_seeds, jobs, tried, stopping)
    return search.run(bounds or Bounds())


class _Search:
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
        self._trials: dict[Size, Trial] = {}
        self._less: dict[str, Trial | None] = {"replicas": None, "slots": None, "cpu_loras": None}
        given = experiment.engine_config().lora
        memory = None if given is None else given.slot_memory
        self._memory = memory if isinstance(memory, int) else None

    def run(self, bounds: Bounds) -> Sized:
        adapters = max(len(self._experiment.open_workload().adapters), 1)
        slots = bounds.slots or (1, self._most_slots(adapters))
        found = self._replicas(bounds, slots, adapters)
        if found is not None:
            found = self._lower(found, "slots", slots[0])
            least = max(found.slots, bounds.cpu_loras[0] if bounds.cpu_loras else 1)
            found = self._lower(found, "cpu_loras", least)
            if self._memory is not None:
                found = self._lower_memory(found, self._memory)
        return Sized(found, list(self._trials.values()), self._less if found is not None else {})

    def _replicas(self, bounds: Bounds, slots: tuple[int, int], adapters: int) -> Size | None:
        """Return the fewest replicas with which a number of slots holds: doubling, then bisection."""
        low, most = bounds.replicas
        failed = low - 1
        count = low
        best: Size | None = None
        while best is None:
            best = self._any_slots(count, slots, bounds, adapters)
            if best is None:
                failed = count
                if count == most:
                    return None
                count = min(count * 2, most)
        while best.replicas - failed > 1:
            middle = (best.replicas + failed) // 2
            found = self._any_slots(middle, slots, bounds, adapters)
            if found is None:
                failed = middle
            else:
                best = found
        return best

    def _any_slots(self, replicas: int, slots: tuple[int, int], bounds: Bounds, adapters: int) -> Size | None:
        """Return a size with this number of replicas that holds; None if there is none."""
        low, count = slots
        for _ in range(SLOT_LADDER):
            cpu_loras = max(count, bounds.cpu_loras[1] if bounds.cpu_loras else adapters)
            size = Size(replicas, count, cpu_loras, self._memory)
            trial = self._try(size)
            if trial.holds:
                return size
            if count == slots[1]:
                self._less["replicas"] = trial
            if count == low:
                return None
            count = max(count // 2, low)
        return None

    def _lower(self, size: Size, name: str, least: int) -> Size:
        """Return the least of one dimension that still holds, by bisection."""
        failed = least - 1
        while getattr(size, name) - failed > 1:
            middle = size._replace(**{name: (getattr(size, name) + failed) // 2})
            trial = self._try(middle)
            if trial.holds:
                size = middle
            else:
                failed = getattr(middle, name)
                self._less[name] = trial
        return size

    def _lower_memory(self, size: Size, given: int) -> Size:
        """Return the fewest sixteenths of the given bytes that still hold, by bisection."""
        self._less["slot_memory"] = None
        failed, held = 0, MEMORY_PARTS
        while held - failed > 1:
            middle = (held + failed) // 2
            trial = self._try(size._replace(slot_memory=given * middle // MEMORY_PARTS))
            if trial.holds:
                held = middle
            else:
                failed = middle
                self._less["slot_memory"] = trial
        return size._replace(slot_memory=given * held // MEMORY_PARTS)

    def _most_slots(self, adapters: int) -> int:
        """Return the largest number of slots that makes sense: as many as there are adapters, or as fit into
        memory."""
        costs = load_costs(self._experiment.preset)
        fits, failed = 0, adapters + 1
        while failed - fits > 1:
            middle = (failed + fits) // 2
            if self._error(costs, middle, adapters) is None:
                fits = middle
            else:
                failed = middle
        if not fits and (error := self._error(costs, 1, adapters)) is not None:
            raise error
        return max(fits, 1)

    def _error(self, costs: CostModel, slots: int, adapters: int) -> ConfigError | None:
        """Return why this number of slots does not fit into memory; None if it does."""
        try:
            costs.plan(self._of(Size(1, slots, max(adapters, slots)), 0).engine_config())
        except ConfigError as error:
            return error
        return None

    def _of(self, size: Size, seed: int) -> Experiment:
        alone = dict.fromkeys(OF_A_FLEET) if size.replicas == 1 else {}
        return msgspec.structs.replace(
            self._experiment,
            **alone,
            slots=size.slots,
            cpu_loras=size.cpu_loras,
            slot_memory=self._experiment.slot_memory if size.slot_memory is None else size.slot_memory,
            replicas=size.replicas if size.replicas > 1 else None,
            seed=self._experiment.seed + seed,
        )

    def _try(self, size: Size) -> Trial:
        known = self._trials.get(size)
        if known is not None:
            return known
        summaries: list[dict[str, Any]] = []
        trial = Trial(size, {}, None, 0, {})
        while trial.holds is None and len(summaries) < self._most_seeds and not trial.error:
            count = min(self._seeds, self._most_seeds - len(summaries))
            try:
                summaries += self._run(size, range(len(summaries), len(summaries) + count))
            except AioEngineError as error:
                trial = trial._replace(holds=False, error=str(error))
                break
            trial = self._judge(size, summaries)
        self._trials[size] = trial
        self._tried(trial)
        return trial

    def _judge(self, size: Size, summaries: Sequence[dict[str, Any]]) -> Trial:
        figures = {o.name: estimate([o.of(summary) for summary in summaries]) for o in self._objectives}
        verdicts = [objective.verdict(figures[objective.name]) for objective in self._objectives]
        holds = False if False in verdicts else None if None in verdicts else True
        return Trial(size, figures, holds, len(summaries), _use(self._experiment, size.replicas, summaries))

    def _run(self, size: Size, seeds: range) -> list[dict[str, Any]]:
        name = f"replicas={size.replicas}-slots={size.slots}-cpu={size.cpu_loras}"
        if size.slot_memory is not None:
            name += f"-bytes={size.slot_memory}"
        tasks = [
            Task(seed, self._of(size, seed), self._out / "runs" / f"{name}-seed={seed}") for seed in seeds
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
        for seed in seeds:
            report = ended[seed]
            if report.summary is None:
                raise ConfigError(report.error or "the run failed")
            if not report.summary["policy"]["valid"]:
                raise ConfigError(
                    f"the policy did not decide every step: {report.summary['policy']['reason']}"
                )
            found.append(with_p95(report.summary, tasks[seed - seeds.start].out))
        return found


def _use(experiment: Experiment, replicas: int, summaries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of the resources that were in use."""
    engines = [summary["engine"] for summary in summaries]
    hits = [summary["hits"] for summary in summaries]

    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else 0.0

    return {
        "device": mean([engine["stepping_share"] for engine in engines]),
        "sequences": mean([engine["mean_running"] for engine in engines])
        / (experiment.max_num_seqs * replicas),
        "kv_cache": mean([engine["mean_kv_used_share"] for engine in engines]),
        "found_in_slot": mean([found["slot_share"] for found in hits]),
        "found_on_disk": mean([found["disk_share"] for found in hits]),
    }
