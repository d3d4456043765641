"""``aioengine lab rerun``: repeats a run from its folder alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.cli.process import EXIT_FAILED


def rerun(
    folder: Annotated[Path, Parameter(show_default=False)],
    /,
    *,
    out: Path | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Run the experiment of a folder again, and compare all files byte for byte.

    Exits with 1 if a file differs.

    Args:
        folder: The folder that was given to --out of lab run; it is only read.
        out: Folder for the new files (by default they are compared and deleted).
    """
    from aioengine.cli.lab.flags import check_out
    from aioengine.cli.progress import progress
    from aioengine.lab.runs.provenance import rerun as run_again
    from aioengine.lab.runs.simulate import run
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    if out is not None:
        check_out(out, "experiment.json")
    with progress("simulating") as show:
        found = run_again(
            folder,
            lambda experiment, new: run(
                experiment,
                new,
                lambda done, total, now: show(done, total, f"{done:,} requests, {now:,.0f} s simulated"),
            ),
            out,
        )
    for change in found.changed:
        print(f"changed: {change}")
    if found.same:
        print("the same bytes")
        return 0
    for name, difference in found.differing.items():
        print(f"aioengine: {name}: {difference}", file=sys.stderr)
    return EXIT_FAILED
