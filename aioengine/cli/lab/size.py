"""``aioengine lab size``: finds how many replicas, slots and places in CPU memory a workload needs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from aioengine.cli.flags import CommonFlags, Count, Given, Texts
from aioengine.cli.lab.flags import SystemFlags, check_out, cores, make_experiment
from aioengine.cli.process import EXIT_FAILED, process
from aioengine.cli.struct_flags import Flags, flag_set
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from aioengine.lab.runs.experiment import Experiment
    from aioengine.lab.sizing.objectives import Objective
    from aioengine.lab.sizing.search import Bounds, Sized, Trial
    from aioengine.lab.workload.spec import WorkloadSpec

NAMES = {
    "replicas": "one replica",
    "slots": "one slot",
    "cpu_loras": "one adapter in CPU memory",
}
MOST_REPLICAS = 16


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
    """Find the smallest number of replicas, slots and adapters in CPU memory that keeps an SLO.

    Every size is run with the serving engine in simulated time, over several seeds. It is accepted if the
    whole 95% interval keeps every objective. Prints what bounds the answer. --replicas, --slots and
    --cpu-loras fix their numbers. Exits with 1 if no size that was tried keeps the objectives.
    """
    from aioengine.cli.progress import progress
    from aioengine.lab.sizing.objectives import parse_objectives
    from aioengine.lab.sizing.search import find_size
    from aioengine.lab.workload.extra import check_extra
    from aioengine.lab.workload.files import read_workload

    check_extra()
    objectives = parse_objectives(flags.slo)
    experiment, bounds = _experiment(flags, system or SystemFlags(), read_workload(flags.workload))
    check_out(flags.out, "size.json")
    stop, count = Event(), itertools.count(1)
    with progress("sizing") as show, process.cancelling(stop.set):
        found = find_size(
            experiment,
            objectives,
            flags.out,
            bounds=bounds,
            seeds=flags.seeds,
            most_seeds=3 * flags.seeds,
            jobs=flags.jobs or cores(),
            tried=lambda trial: show(next(count), None, f"{trial.size}: {_broken(trial, objectives)}"),
            stopping=stop.is_set,
        )
    _write(flags.out, found, objectives, experiment)
    _print(found, objectives)
    print(f"files:  {flags.out}")
    return 0 if found.size is not None else EXIT_FAILED


def _experiment(flags: SizeFlags, system: SystemFlags, workload: WorkloadSpec) -> tuple[Experiment, Bounds]:
    """Return what is run, and the bounds of the search. Raises ConfigError."""
    from aioengine.lab.runs.experiment import OF_A_FLEET
    from aioengine.lab.sizing.search import Bounds

    if system.replicas is not None and flags.max_replicas is not None:
        raise ConfigError("--max-replicas: their number is given by --replicas; leave one out")
    most = system.replicas or flags.max_replicas or MOST_REPLICAS
    own = {"policy": flags.policy, "slots": flags.slots, "seed": flags.seed}
    if conditions := [name for name in OF_A_FLEET if getattr(system, name) is not None]:
        if most == 1:
            flag = conditions[0].replace("_", "-")
            raise ConfigError(f"--{flag}: is for a fleet, and only one replica is tried; allow more of them")
        own["replicas"] = most
    if flags.slots is not None and system.cpu_loras is None:
        own["cpu_loras"] = max(flags.slots, 64)
    if flags.limit is not None:
        workload = msgspec.structs.replace(workload, limit=flags.limit)
    bounds = Bounds(
        replicas=(1 if system.replicas is None else most, most),
        slots=None if flags.slots is None else (flags.slots,) * 2,
        cpu_loras=None if system.cpu_loras is None else (system.cpu_loras,) * 2,
    )
    return make_experiment(None, None, system, own, workload), bounds


def _broken(trial: Trial, objectives: Sequence[Objective]) -> str:
    """Describe the objectives that a size does not keep, or for which the result is not clear."""
    texts = [
        objective.text(figure) + (" (not clear)" if verdict is None else "")
        for objective in objectives
        if (figure := trial.figures.get(objective.name)) is not None
        and (verdict := objective.verdict(figure)) is not True
    ]
    return f"cannot be run: {trial.error}" if trial.error else "; ".join(texts) or "holds"


def _print(found: Sized, objectives: Sequence[Objective]) -> None:
    if found.size is None:
        print("no size that was tried keeps the objectives:")
        for trial in found.trials[-3:]:
            print(f"  {trial.size}: {_broken(trial, objectives)}")
        _print_use(found.trials[-1])
        print("aioengine: raise --max-replicas, or the bounds of --slo", file=sys.stderr)
        return
    trial = found.trial(found.size)
    print(f"{found.size}")
    for objective in objectives:
        print(f"  {objective.text(trial.figures[objective.name])}")
    _print_use(trial)
    print("what bounds it:")
    for name, less in found.neighbours.items():
        if less is not None:
            print(f"  with {NAMES[name]} less: {_broken(less, objectives)}")
        else:
            print(f"  {name}: {getattr(found.size, name)} is the least that can be, or was given")
    runs = sum(trial.seeds for trial in found.trials)
    print(f"{len(found.trials)} sizes tried in {runs} runs; intervals are 95% over the seeds of a size")


def _print_use(trial: Trial) -> None:
    if use := trial.use:
        print(
            f"  steps take {use['device']:.0%} of the time, {use['sequences']:.0%} of the sequences and "
            f"{use['kv_cache']:.0%} of the KV cache are in use; {use['found_in_slot']:.0%} of the requests "
            f"find their adapter in a slot, {use['found_on_disk']:.0%} on disk"
        )


def _write(out: Path, found: Sized, objectives: Sequence[Objective], experiment: Experiment) -> None:
    def plain(value: Any) -> Any:
        """Return named tuples as objects, at any depth."""
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return plain(value._asdict()) if hasattr(value, "_asdict") else value

    less = found.neighbours.items()
    values = {
        "size": plain(found.size),
        "slo": {objective.name: objective.bound for objective in objectives},
        "bounded_by": {name: None if trial is None else _broken(trial, objectives) for name, trial in less},
        "trials": [plain(trial) for trial in found.trials],
        "experiment": experiment.to_dict(),
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (out / "size.json").write_text(text, encoding="utf-8")
