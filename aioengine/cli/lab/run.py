"""``aioengine lab run``: runs one policy on one workload."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from aioengine.cli.common import CommonFlags
from aioengine.cli.help import FOLDED
from aioengine.cli.lab.flags import SystemFlags, WorkloadFlags, check_out, make_experiment
from aioengine.cli.process import EXIT_FAILED, EXIT_NOT_VALID

if TYPE_CHECKING:
    from aioengine.lab.runs.experiment import Experiment

DEFAULT_OUT = Path("lab-run")
_OWN = ("policy", "slots", "scale", "seed")
"""Fields of an experiment."""
COLLECT_AFTER = 100_000
"""New objects after which the garbage collector looks for cycles."""
_RUN = Group("Run", sort_key=7)
_MORE = Group(f"{FOLDED} of the run", sort_key=24)


@Parameter(name="*", group=_RUN)
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    policy: str | None = None
    """Name in aioengine policies, or my_policy.py:MyPolicy (fcfs)."""
    slots: int | None = None
    """Adapter slots on the device (8)."""
    scale: float | None = None
    """Factor on the rate of arrivals (1)."""
    seed: int | None = None
    """Seed of everything drawn: arrivals, adapters, lengths (0)."""
    out: Path = DEFAULT_OUT
    """Folder for the results."""
    experiment: Path | None = None
    """Repeat the run of this experiment.json, or use a workload.toml; flags override it."""
    report: Annotated[bool, Parameter(negative="--no-report")] = True
    """Draw figures and write report.html."""
    allow_fallback: Annotated[bool, Parameter(negative="", group=_MORE)] = False
    """Accept a run in which the policy failed and another one decided in its place."""


def run(
    *,
    workload: WorkloadFlags | None = None,
    system: SystemFlags | None = None,
    flags: RunFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Replay a trace, or synthetic arrivals, through the engine in simulated time.

    The policy and the engine are those of serving; a cost model gives the time of steps and loads. The
    same flags give the same files, byte for byte.
    """
    flags = flags or RunFlags()
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    own = {name: getattr(flags, name) for name in _OWN}
    experiment = make_experiment(flags.experiment, workload or WorkloadFlags(), system or SystemFlags(), own)
    check_out(flags.out, "experiment.json")
    return _run(experiment, flags)


def _run(experiment: Experiment, flags: RunFlags) -> int:
    from aioengine.cli.lab.tables import print_summary
    from aioengine.cli.progress import progress
    from aioengine.lab.report.run_figures import PLOTS
    from aioengine.lab.report.run_page import write_report
    from aioengine.lab.runs.comparison import invalid_text
    from aioengine.lab.runs.open_loop import RunStalled
    from aioengine.lab.runs.simulate import run
    from aioengine.lab.workload.extra import NO_REPORT, can_draw

    try:
        with progress("simulating") as show, fewer_collections():
            result = run(
                experiment,
                flags.out,
                lambda done, total, now: show(done, total, f"{done:,} requests, {now:,.0f} s simulated"),
                lambda text: print(f"aioengine: {text}", file=sys.stderr),
            )
    except RunStalled as error:
        print(f"aioengine: {error}", file=sys.stderr)
        return EXIT_FAILED
    print_summary(result.summary)
    if flags.report and not can_draw():
        print(f"aioengine: {NO_REPORT}", file=sys.stderr)
    elif flags.report:
        with progress("drawing") as show:
            drawn = iter(range(1, len(PLOTS) + 1))
            page = write_report(flags.out, lambda: show(next(drawn), len(PLOTS), "figures"))
        print(f"report: {page}")
    print(f"files:  {flags.out}")
    policy = result.summary["policy"]
    if policy["valid"] or flags.allow_fallback:
        return 0
    print(f"aioengine: this run is {invalid_text(policy)}", file=sys.stderr)
    if policy["traceback"] is not None:
        print(policy["traceback"], end="", file=sys.stderr)
    print("aioengine: with --allow-fallback the run is accepted", file=sys.stderr)
    return EXIT_NOT_VALID


@contextmanager
def fewer_collections() -> Iterator[None]:
    """Context in which the garbage collector looks for cycles less often: a run makes very many objects, and
    few cycles. The process is the command's own; :func:`aioengine.lab.run` leaves the collector alone."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
