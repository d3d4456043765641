"""``aioengine lab size``: finds how many replicas a workload needs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from aioengine.cli.flags import Count, Given, Texts
from aioengine.cli.lab.flags import SystemFlags, check_out, cores, make_experiment
from aioengine.cli.lab.run import warn
from aioengine.cli.process import EXIT_FAILED
from aioengine.cli.progress import progress
from aioengine.cli.struct_flags import FieldsOf, flag_set
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.workload.spec import WorkloadSpec, read_workload

if TYPE_CHECKING:
    from aioengine.lab.runs.sizing import Sizing, Trial


@flag_set(
    "Size", 4, FieldsOf(Experiment, only=("policy", "slots", "seed")), FieldsOf(WorkloadSpec, only=("limit",))
)
class SizeFlags(SystemFlags):
    workload: Given
    """Workload: TOML or JSON with its fields, an experiment.json, or a trace."""
    slo: Annotated[Texts, Parameter(show_default=False)]
    """Objectives: ttft_p99=2.0, itl_p95=0.05, latency_mean=8, goodput=0.95, served=0.99."""
    max_replicas: Count = 16
    """Maximum replicas to try."""
    seeds: int = 3
    """Runs of each size; up to three times as many where the result is not clear."""
    jobs: Count | None = None
    """Parallel runs (as many as cores)."""
    out: Path = Path("lab-size")
    """Folder for the results: size.json, and the runs."""


def size(*, flags: SizeFlags) -> int:
    """Find the smallest number of replicas that keeps an SLO.

    Every number is run with the serving engine in simulated time, over several seeds. It is accepted if the
    whole 95% interval keeps every objective. Prints what bounds the answer. Exits with 1 if no number that
    was tried keeps the objectives.
    """
    from aioengine.lab.runs.sizing import Sizing, parse_objectives

    objectives, workload = parse_objectives(flags.slo), read_workload(flags.workload)
    most = flags.replicas or flags.max_replicas
    experiment = make_experiment(None, flags, workload, slo=None, replicas=most)
    check_out(flags.out, "size.json")
    count = itertools.count(1)
    with progress("sizing") as show:
        sizing = Sizing(
            experiment,
            objectives,
            flags.out,
            seeds=flags.seeds,
            jobs=flags.jobs or cores(),
            tried=lambda trial: show(next(count), None, _text(sizing, trial)),
        )
        found = sizing.find(1 if flags.replicas is None else most, most)
    trials = sorted(sizing.trials.values())
    values = {
        "replicas": found,
        "slo": {one.name: one.bound for one in objectives},
        "trials": [
            {**trial._asdict(), "figures": {name: one._asdict() for name, one in trial.figures.items()}}
            for trial in trials
        ],
        "experiment": experiment,
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "size.json").write_bytes(msgspec.json.format(msgspec.json.encode(values), indent=2))
    if found is None:
        print("no number of replicas that was tried keeps the objectives")
        warn("raise --max-replicas, or the bounds of --slo")
    for trial in trials:
        if found is None or trial.replicas in (found, found - 1):
            print(_text(sizing, trial))
    print("intervals are 95% over the seeds")
    print(f"files:  {flags.out}")
    return 0 if found is not None else EXIT_FAILED


def _text(sizing: Sizing, trial: Trial) -> str:
    """Describe a number of replicas, with the objectives that it does not keep or, if it does, all."""
    if trial.error:
        return f"{trial.replicas} replicas: cannot be run: {trial.error}"
    found = [(one, trial.figures[one.name]) for one in sizing.objectives]
    shown = [one.text(figure) for one, figure in found if trial.holds or not one.verdict(figure)]
    return f"{trial.replicas} replicas: {'; '.join(shown)}"
