"""Commands of the lab for folders: a new study, and a run again."""

from __future__ import annotations

import sys
from pathlib import Path

from aioengine.cli.flags import Given
from aioengine.cli.lab.flags import check_out
from aioengine.cli.lab.run import simulated
from aioengine.cli.process import EXIT_FAILED
from aioengine.cli.progress import progress


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
