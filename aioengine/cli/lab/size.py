"""``aioengine lab size``: finds how many replicas and slots a workload needs."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from aioengine.cli.flags import CommonFlags, Count, Given, Texts
from aioengine.cli.lab.flags import SystemFlags, check_out, cores, make_experiment
from aioengine.cli.process import EXIT_FAILED, process
from aioengine.cli.struct_flags import Flags, flag_set

if TYPE_CHECKING:
    from aioengine.lab.runs.sizing import Size, Sizing, Trial


@flag_set("Size", 4)
class SizeFlags(Flags):
    workload: Given
    """Workload: TOML or JSON with its fields, an experiment.json, or a trace."""
    slo: Annotated[Texts, Parameter(show_default=False)]
    """Objectives: ttft_p99=2.0, itl_p95=0.05, latency_mean=8, goodput=0.95, served=0.99."""
    policy: str | None = None
    """Name in aioengine policies (fcfs)."""
    slots: int | None = None
    """Number of slots, which is then not searched."""
    max_replicas: Count | None = None
    """Maximum replicas to try (16)."""
    seeds: int = 3
    """Runs of each size; up to three times as many where the result is not clear."""
    seed: int | None = None
    """First seed (0)."""
    limit: int | None = None
    """Maximum requests of the workload."""
    jobs: Count | None = None
    """Parallel runs (as many as cores)."""
    out: Path = Path("lab-size")
    """Folder for the results: size.json, and the runs."""


def size(
    *,
    flags: SizeFlags,
    system: SystemFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Find the smallest number of replicas, and then of slots, that keeps an SLO.

    Every size is run with the serving engine in simulated time, over several seeds. It is accepted if the
    whole 95% interval keeps every objective. Prints what bounds the answer. --replicas and --slots fix their
    numbers. Exits with 1 if no size that was tried keeps the objectives.
    """
    from aioengine.cli.progress import progress
    from aioengine.lab.runs.sizing import Sizing, parse_objectives
    from aioengine.lab.workload.extra import check_extra
    from aioengine.lab.workload.spec import read_workload

    check_extra()
    objectives, system = parse_objectives(flags.slo), system or SystemFlags()
    workload = read_workload(flags.workload)
    if flags.limit is not None:
        workload = msgspec.structs.replace(workload, limit=flags.limit)
    most = system.replicas or flags.max_replicas or 16
    own = {"policy": flags.policy, "slots": 1, "seed": flags.seed, "replicas": most}
    experiment = make_experiment(None, None, system, own, workload)
    check_out(flags.out, "size.json")
    stop, count = Event(), itertools.count(1)
    with progress("sizing") as show, process.cancelling(stop.set):
        sizing = Sizing(
            experiment,
            objectives,
            flags.out,
            seeds=flags.seeds,
            jobs=flags.jobs or cores(),
            tried=lambda trial: show(next(count), None, f"{trial.size}: {_broken(sizing, trial)}"),
            stopping=stop.is_set,
        )
        replicas = (1 if system.replicas is None else most, most)
        found = sizing.find(replicas, None if flags.slots is None else (flags.slots, flags.slots))
    _write(sizing, found)
    _print(sizing, found)
    print(f"files:  {flags.out}")
    return 0 if found is not None else EXIT_FAILED


def _broken(sizing: Sizing, trial: Trial) -> str:
    """Describe the objectives that a size does not keep, or for which the result is not clear."""
    if trial.error:
        return f"cannot be run: {trial.error}"
    verdicts = [(one, one.verdict(trial.figures[one.name])) for one in sizing.objectives]
    texts = [
        one.text(trial.figures[one.name]) + (" (not clear)" if verdict is None else "")
        for one, verdict in verdicts
        if not verdict
    ]
    return "; ".join(texts) or "holds"


def _print(sizing: Sizing, found: Size | None) -> None:
    if found is None:
        print("no size that was tried keeps the objectives:")
        for trial in [*sizing.trials.values()][-3:]:
            print(f"  {trial.size}: {_broken(sizing, trial)}")
        print("aioengine: raise --max-replicas, or the bounds of --slo", file=sys.stderr)
        return
    print(found)
    for objective in sizing.objectives:
        print(f"  {objective.text(sizing.trials[found].figures[objective.name])}")
    print("what bounds it:")
    for name, less in sizing.less(found).items():
        if less is not None:
            print(f"  with one {name.removesuffix('s')} less: {_broken(sizing, less)}")
        else:
            print(f"  {name}: {getattr(found, name)} is the least that can be, or was given")
    runs = sum(trial.seeds for trial in sizing.trials.values())
    print(f"{len(sizing.trials)} sizes tried in {runs} runs; intervals are 95% over the seeds of a size")


def _write(sizing: Sizing, found: Size | None) -> None:
    values = {
        "size": None if found is None else found._asdict(),
        "slo": {objective.name: objective.bound for objective in sizing.objectives},
        "trials": [
            trial._asdict()
            | {"size": trial.size._asdict(), "figures": {n: e._asdict() for n, e in trial.figures.items()}}
            for trial in sizing.trials.values()
        ],
        "experiment": sizing.experiment.to_dict(),
    }
    sizing.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (sizing.out / "size.json").write_text(text, encoding="utf-8")
