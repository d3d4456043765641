"""``aioengine lab report``: makes the report again, from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.errors import ConfigError


def report(
    folder: Annotated[Path, Parameter(show_default=False)],
    /,
    *,
    rank_by: str | None = None,
    vector: Annotated[bool, Parameter(negative="")] = False,
    common: CommonFlags | None = None,
) -> int:
    """Redraw the figures and report.html of a run or a comparison.

    Args:
        folder: The folder that was given to --out.
        rank_by: Measure that a comparison's policies are ranked by.
        vector: Write the figures as PDF and SVG too, and captions with all parameters.
    """
    from aioengine.cli.progress import progress
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    from aioengine.lab.analysis.measures import DEFAULT_RANKING
    from aioengine.lab.report.compare_page import write_compare_report
    from aioengine.lab.report.run_page import write_report

    with progress("drawing") as show:
        if (folder / "comparison.json").exists():
            page = write_compare_report(
                folder, rank_by or DEFAULT_RANKING, lambda: show(0, None, "figures"), vector=vector
            )
        elif rank_by is not None and (folder / "experiment.json").exists():
            raise ConfigError(f"--rank-by {rank_by}: {folder} is a run, and has no ranking; leave it out")
        elif (folder / "experiment.json").exists():
            page = write_report(folder, lambda: show(0, None, "figures"), vector=vector)
        else:
            raise ConfigError(
                f"{folder}: has no experiment.json and no comparison.json; 'aioengine lab run' and "
                "'aioengine lab compare' write them into --out"
            )
    print(f"report: {page}")
    return 0
