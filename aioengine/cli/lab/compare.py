"""``aioengine lab compare``: policies side by side."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from aioengine.checks import read_json
from aioengine.cli.flags import Count
from aioengine.cli.lab.flags import (
    Floats,
    Ints,
    SystemFlags,
    WorkloadFlags,
    check_out,
    cores,
    make_experiment,
)
from aioengine.cli.lab.run import warn
from aioengine.cli.process import EXIT_FAILED, EXIT_NOT_VALID
from aioengine.cli.progress import progress
from aioengine.cli.struct_flags import flag_set
from aioengine.cli.tables import new_table, output_console
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from aioengine.lab.report.compare_page import Compare
    from aioengine.lab.runs.comparison import Comparison


@flag_set(
    "Comparison",
    4,
    shown=("policy", "slots", "scale", "seeds", "seed", "jobs", "out", "experiment", "rank_by"),
)
class CompareFlags(WorkloadFlags, SystemFlags):
    policy: Annotated[list[str] | None, Parameter(metavar="A,B,...")] = None
    """Policies; the others are compared to the first (fcfs,vllm+lru). Repeatable."""
    slots: Ints | None = None
    """Numbers of adapter slots (8)."""
    scale: Floats | None = None
    """Factors of the rate of arrivals (1)."""
    seeds: Count | None = None
    """Runs of each setting, for intervals (3)."""
    seed: int | None = None
    """The first seed (0)."""
    jobs: Count | None = None
    """Parallel runs (as many as cores)."""
    out: Path = Path("lab-compare")
    """Folder for the results."""
    experiment: Path | None = None
    """Repeat this comparison.json, or vary this experiment.json; flags override it."""
    rank_by: str = "ttft_seconds.p99"
    """Measure that policies are ranked by."""
    allow_fallback: bool = False
    """Also rank policies that failed, and in whose place another one decided."""
    strict: bool = False
    """Exit with 3 if a run is not what was asked: a warning says where."""


def compare(*, flags: CompareFlags = CompareFlags()) -> int:
    """Run policies x slots x loads over several seeds, and rank the policies.

    All policies get the same arrivals. Means have 95% intervals over the seeds. A failed run is reported, and
    the others continue.
    """
    from aioengine.lab.analysis.measures import find_measure
    from aioengine.lab.report.compare_page import load_compare, write_compare_report
    from aioengine.lab.runs import comparison as runs

    find_measure(flags.rank_by)
    comparison = _comparison(flags)
    check_out(flags.out, "comparison.json")
    total, count = len(comparison.tasks(flags.out)), itertools.count(1)
    with progress("comparing") as show:
        found = runs.compare(
            comparison,
            flags.out,
            jobs=flags.jobs or cores(),
            allow_fallback=flags.allow_fallback,
            ended=lambda task, outcome: show(next(count), total, task.out.name),
            say=warn,
        )
    for failure in found.failures:
        warn(f"run {failure.folder}: {'' if failure.invalid else 'failed: '}{failure.error}")
    for texts in found.warnings.values():
        warn(f"{len(texts)} of {total} runs: {texts[0]}")
    if len(found.failures) < found.results.height:
        print_rankings(load_compare(flags.out, flags.rank_by))
        print(f"report: {write_compare_report(flags.out, flags.rank_by)}")
    print(f"files:  {flags.out}")
    if any(failure.invalid for failure in found.failures) or (flags.strict and found.warnings):
        return EXIT_NOT_VALID
    return EXIT_FAILED if found.failures else 0


def _comparison(flags: CompareFlags) -> Comparison:
    """Make the comparison from the flags, which override --experiment. Raises ConfigError."""
    from aioengine.lab.runs.comparison import Comparison, read_comparison

    file, before = flags.experiment, dict[str, Any]()
    if file is not None and file.suffix != ".toml" and "comparison" in read_json(file):
        before = msgspec.structs.asdict(read_comparison(file))
    policies, routers = split_policies(flags.policy or ()), split_policies(filter(None, [flags.router]))
    # The experiment has the first of each.
    asked = {"policy": policies, "router": routers, "slots": flags.slots, "scale": flags.scale}
    own: dict[str, Any] = {name: values[0] if values else None for name, values in asked.items()}
    experiment = make_experiment(file, flags, **own)
    values = before or {
        # Where routers are compared, engines have the same policy unless flags say otherwise.
        "policies": ["fcfs", "vllm+lru"] if file is None and not routers else [experiment.policy],
        "slots": [experiment.slots],
        "scales": [experiment.workload.scale],
        "seeds": range(3),
    }
    given = {"policies": policies, "slots": flags.slots, "scales": flags.scale, "routers": routers}
    values |= {name: value for name, value in given.items() if value}
    if not before or flags.seeds is not None or flags.seed is not None:
        count = flags.seeds or len(values["seeds"])
        values["seeds"] = list(range(experiment.seed, experiment.seed + count))
    return Comparison(**{**values, "experiment": experiment})


def split_policies(texts: Iterable[str]) -> list[str]:
    """Split a list of policies: "fcfs,vtc:input_weight=1,output_weight=2" is two policies, because an option
    after a comma belongs to the policy before it."""
    found = [part.strip() for text in texts for part in re.split(r",(?!\s*[A-Za-z_]\w*=)", text)]
    if not all(found):
        raise ConfigError("--policy: has an empty name; write fcfs,vtc")
    return found


def print_rankings(compare: Compare) -> None:
    """Print a table for each setting of a comparison, the best policy first."""
    from aioengine.lab.analysis.measures import policy_label
    from aioengine.lab.report.compare_page import rankings

    console = output_console()
    for ranking in rankings(compare):
        heads = (f">{head}" for head in ranking.heads)
        table = new_table(console, "", "policy", *heads, title=ranking.title)
        table.columns[1].no_wrap = True  # on a narrow terminal numbers take two lines rather than names none
        for row in ranking.rows:
            cells = ("\n".join(filter(None, cell[:2])) for cell in row.cells)
            table.add_row(row.place, policy_label(row.name), *cells)
        console.print(table)
    print("=: the seeds do not tell which of these is better (95%)")
