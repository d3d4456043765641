"""``aioengine lab run``: runs one policy on one workload."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aioengine.cli.lab.flags import SystemFlags, WorkloadFlags, check_out, make_experiment
from aioengine.cli.process import EXIT_FAILED, EXIT_NOT_VALID
from aioengine.cli.progress import Show, progress
from aioengine.cli.struct_flags import FieldsOf, flag_set
from aioengine.cli.tables import print_table
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.workload.spec import WorkloadSpec

COLLECT_AFTER = 100_000
"""New objects after which the garbage collector looks for cycles: a run makes very many objects, and few
cycles. The process is the command's own; :func:`aioengine.lab.run` leaves the collector alone."""


@flag_set(
    "Run",
    7,
    FieldsOf(Experiment, only=("policy", "slots", "seed")),
    FieldsOf(WorkloadSpec, only=("scale",)),
    shown=("policy", "slots", "scale", "seed", "out", "experiment", "report"),
)
class RunFlags(WorkloadFlags, SystemFlags):
    out: Path = Path("lab-run")
    """Folder for the results."""
    experiment: Path | None = None
    """Repeat the run of this experiment.json, or use a workload.toml; flags override it."""
    report: bool = True
    """Draw figures and write report.html."""
    allow_fallback: bool = False
    """Accept a run in which the policy failed and another one decided in its place."""
    strict: bool = False
    """Exit with 3 if the run is not what was asked: a warning says where."""


def run(*, flags: RunFlags = RunFlags()) -> int:
    """Replay a trace, or synthetic arrivals, through the engine in simulated time.

    The policy and the engine are those of serving; a cost model gives the time of steps and loads. The
    same flags give the same files, byte for byte.
    """
    from aioengine.lab.report.run_page import write_report
    from aioengine.lab.runs import simulate
    from aioengine.lab.runs.comparison import invalid_text
    from aioengine.lab.runs.replay import RunStalled

    experiment = make_experiment(flags.experiment, flags)
    check_out(flags.out, "experiment.json")
    try:
        gc.set_threshold(COLLECT_AFTER)
        with progress("simulating") as show:
            result = simulate.run(experiment, flags.out, simulated(show), warn)
    except RunStalled as error:
        warn(str(error))
        return EXIT_FAILED
    print_summary(result.summary)
    if flags.report:
        print(f"report: {write_report(flags.out)}")
    print(f"files:  {flags.out}")
    policy, warnings = result.summary["policy"], result.summary["warnings"]
    for text in warnings:
        warn(text)
    if policy["valid"] or flags.allow_fallback:
        return EXIT_NOT_VALID if warnings and flags.strict else 0
    warn(f"this run is {invalid_text(policy)}")
    if policy["traceback"] is not None:
        print(policy["traceback"], end="", file=sys.stderr)
    warn("with --allow-fallback the run is accepted")
    return EXIT_NOT_VALID


def warn(text: str) -> None:
    print(f"aioengine: {text}", file=sys.stderr)


def simulated(show: Show) -> Callable[[int, int | None, float], None]:
    """Return a function for a run to call, which shows how far it is."""
    return lambda done, total, now: show(done, total, f"{done:,} requests, {now:,.0f} s simulated")


def print_summary(summary: dict[str, Any]) -> None:
    """Print the table at the end of a run."""
    from aioengine.lab.analysis.measures import MEASURES
    from aioengine.lab.analysis.summary import flatten

    flat = flatten(summary)
    there = (measure for measure in MEASURES if flat.get(measure.name) is not None)
    print_table(("figure", ">"), [(measure.label, measure.text(flat[measure.name])) for measure in there])
    if errors := summary["requests_by_error"]:
        each = ", ".join(f"{count:,} {error}" for error, count in errors.items())
        warn(f"not all requests were served: {each}")
