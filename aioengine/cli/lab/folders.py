"""Commands of the lab for folders: a new study, a run again, and its report."""

from __future__ import annotations

import sys
from pathlib import Path

from aioengine.cli.flags import Given, Switch
from aioengine.cli.lab.flags import check_out
from aioengine.cli.lab.run import simulated
from aioengine.cli.process import EXIT_FAILED
from aioengine.cli.progress import progress
from aioengine.errors import ConfigError


def new(folder: Given, /) -> int:
    """Write a study that runs as it is: a policy, a workload, a comparison and a notebook.

    Args:
        folder: Name of the study, and of its new folder.
    """
    from aioengine.lab.runs.study import new_study

    for file in new_study(folder):
        print(file)
    print(f"next: aioengine policies check {folder / 'policy.py'}:MyPolicy")
    print(f"      python {folder / 'compare.py'}")
    return 0


def report(folder: Given, /, *, rank_by: str = "ttft_seconds.p99", vector: Switch = False) -> int:
    """Redraw the figures and report.html of a run or a comparison.

    Args:
        folder: The folder that was given to --out.
        rank_by: Measure that a comparison's policies are ranked by.
        vector: Write the figures as PDF and SVG too, and captions with all parameters.
    """
    from aioengine.lab.report.compare_page import write_compare_report
    from aioengine.lab.report.run_page import write_report

    if (folder / "comparison.json").exists():
        page = write_compare_report(folder, rank_by, vector=vector)
    elif (folder / "experiment.json").exists():
        page = write_report(folder, vector=vector)
    else:
        raise ConfigError(
            f"{folder}: has no experiment.json and no comparison.json; 'aioengine lab run' and "
            "'aioengine lab compare' write them into --out"
        )
    print(f"report: {page}")
    return 0


def rerun(folder: Given, /, *, out: Path | None = None) -> int:
    """Run the experiment of a folder again, and compare all files byte for byte.

    Exits with 1 if a file differs.

    Args:
        folder: The folder that was given to --out of lab run; it is only read.
        out: Folder for the new files (by default they are compared and deleted).
    """
    from aioengine.lab.runs import provenance, simulate

    if out is not None:
        check_out(out, "experiment.json")
    with progress("simulating") as show:
        found = provenance.rerun(
            folder, lambda experiment, new: simulate.run(experiment, new, simulated(show)), out
        )
    for change in found.changed:
        print(f"changed: {change}")
    for name, difference in found.differing.items():
        print(f"aioengine: {name}: {difference}", file=sys.stderr)
    if found.differing:
        return EXIT_FAILED
    print("the same bytes")
    return 0
