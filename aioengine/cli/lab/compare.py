"""``aioengine lab compare``: policies side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from aioengine.checks import read_json
from aioengine.cli.common import CommonFlags
from aioengine.cli.help import FOLDED
from aioengine.cli.lab.flags import (
    SystemFlags,
    WorkloadFlags,
    check_out,
    jobs_of,
    make_experiment,
    numbers,
)
from aioengine.cli.process import EXIT_FAILED, EXIT_NOT_VALID, process
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from aioengine.lab.runs.comparison import Compared, Comparison
    from aioengine.lab.runs.pool import Report

DEFAULT_OUT = Path("lab-compare")
_COMPARE = Group("Comparison", sort_key=4)
_MORE = Group(f"{FOLDED} of the comparison", sort_key=24)
_SEVERAL = Parameter(group=_COMPARE, negative="", metavar="A,B,...")


@Parameter(name="*", group=_COMPARE)
@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    policy: Annotated[list[str] | None, _SEVERAL] = None
    """Policies; the others are compared to the first (fcfs,vllm+lru). Repeatable."""
    slots: Annotated[list[str] | None, _SEVERAL] = None
    """Numbers of adapter slots (8)."""
    scale: Annotated[list[str] | None, _SEVERAL] = None
    """Factors of the rate of arrivals (1)."""
    seeds: int | None = None
    """Runs of each setting, for intervals (3)."""
    seed: int | None = None
    """The first seed (0)."""
    jobs: int | None = None
    """Parallel runs (as many as cores)."""
    out: Path = DEFAULT_OUT
    """Folder for the results."""
    experiment: Path | None = None
    """Repeat this comparison.json, or vary this experiment.json; flags override it."""
    rank_by: str = "ttft_seconds.p99"
    """Measure that policies are ranked by."""
    allow_fallback: Annotated[bool, Parameter(negative="", group=_MORE)] = False
    """Also rank policies that failed, and in whose place another one decided."""


def compare(
    *,
    flags: CompareFlags | None = None,
    workload: WorkloadFlags | None = None,
    system: SystemFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Run policies x slots x loads over several seeds, and rank the policies.

    All policies get the same arrivals. Means have 95% intervals over the seeds. A failed run is reported, and
    the others continue.
    """
    flags = flags or CompareFlags()
    from aioengine.lab.analysis.measures import find_measure
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    find_measure(flags.rank_by)
    jobs = jobs_of(flags.jobs)
    comparison = make_comparison(flags, workload or WorkloadFlags(), system or SystemFlags())
    check_out(flags.out, "comparison.json")
    found = _compare(comparison, flags.out, jobs, flags.allow_fallback)
    return _conclude(found, comparison, flags)


def make_comparison(flags: CompareFlags, workload: WorkloadFlags, system: SystemFlags) -> Comparison:
    """Make the comparison from the flags, which override --experiment. Raises ConfigError."""
    from aioengine.lab.runs.comparison import Comparison, read_comparison

    file = flags.experiment
    before = None
    if file is not None and file.suffix != ".toml" and "comparison" in read_json(file):
        before = read_comparison(file)
    policies = split_policies(flags.policy) if flags.policy else None
    slots = numbers("--slots", flags.slots, int)
    scales = numbers("--scale", flags.scale, float)
    own = {
        "seed": flags.seed,
        "policy": policies[0] if policies else None,
        "slots": slots[0] if slots else None,
        "scale": scales[0] if scales else None,
    }
    routers = split_policies([system.router]) if system.router else []
    if routers:
        system = SystemFlags(**{**vars(system), "router": routers[0]})
    experiment = make_experiment(file, workload, system, own)
    if flags.seeds is not None and flags.seeds < 1:
        raise ConfigError(f"--seeds {flags.seeds}: must be at least 1")
    # Where routers are compared, engines have the same policy unless flags say otherwise.
    default = ["fcfs", "vllm+lru"] if file is None and not routers else [experiment.policy]
    found = before or Comparison(
        experiment=experiment,
        policies=[*default],
        slots=[experiment.slots],
        scales=[experiment.workload.scale],
        seeds=[0, 1, 2],
        routers=[],
    )
    seeds = found.seeds
    if before is None or flags.seeds is not None or flags.seed is not None:
        first, count = experiment.seed, flags.seeds or len(found.seeds)
        seeds = list(range(first, first + count))
    return Comparison(
        experiment=experiment,
        policies=[*(policies or found.policies)],
        slots=slots or found.slots,
        scales=scales or found.scales,
        seeds=seeds,
        routers=routers or found.routers,
    )


def split_policies(texts: Iterable[str]) -> list[str]:
    """Split a list of policies: "fcfs,vtc:input_weight=1,output_weight=2" is two policies, because an option
    after a comma belongs to the policy before it."""
    found: list[str] = []
    for text in texts:
        parts: list[str] = []
        for part in text.split(","):
            if parts and re.match(r"[A-Za-z_]\w*=", part):
                parts[-1] += f",{part}"
            else:
                parts.append(part)
        found += [part.strip() for part in parts]
    if not all(found):
        raise ConfigError("--policy: has an empty name; write fcfs,vtc")
    return found


def _compare(comparison: Comparison, out: Path, jobs: int, allow_fallback: bool) -> Compared:
    from aioengine.cli.progress import progress
    from aioengine.lab.runs.comparison import compare

    tasks = comparison.tasks(out)
    under_way: dict[int, float] = {}
    ended, stop = 0, Event()

    with progress("comparing") as show, process.cancelling(stop.set):

        def report(found: Report) -> None:
            nonlocal ended
            if found.kind == "progress":
                under_way[found.key] = min(found.done / found.total, 1.0) if found.total else 0.0
            else:
                under_way.pop(found.key, None)
                ended += 1
            done = ended + sum(under_way.values())
            show(done, len(tasks), f"{ended:,} of {len(tasks):,} runs, {tasks[found.key].out.name}")

        return compare(
            comparison,
            out,
            jobs=jobs,
            allow_fallback=allow_fallback,
            report=report,
            say=lambda text: print(f"aioengine: {text}", file=sys.stderr),
            stopping=stop.is_set,
        )


def _conclude(found: Compared, comparison: Comparison, flags: CompareFlags) -> int:
    """Print the rankings and the failures, and write the report."""
    from aioengine.cli.lab.tables import print_rankings
    from aioengine.cli.progress import progress
    from aioengine.lab.report.compare_page import load_compare, write_compare_report
    from aioengine.lab.runs.simulate import ageing_text
    from aioengine.lab.workload.extra import NO_REPORT, can_draw

    for failure in found.failures:
        said = failure.error if failure.invalid else f"failed: {failure.error}"
        print(f"aioengine: run {failure.folder}: {said}", file=sys.stderr)
    if len(found.failures) < found.results.height:
        print_rankings(load_compare(flags.out, flags.rank_by))
        print(ageing_text(comparison.policies, comparison.experiment.ageing))
        if not can_draw():
            print(f"aioengine: {NO_REPORT}", file=sys.stderr)
        else:
            with progress("drawing") as show:
                page = write_compare_report(flags.out, flags.rank_by, lambda: show(0, None, "figures"))
            print(f"report: {page}")
    print(f"files:  {flags.out}")
    if any(failure.invalid for failure in found.failures):
        return EXIT_NOT_VALID
    return EXIT_FAILED if found.failures else 0
