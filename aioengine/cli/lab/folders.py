"""Commands of the lab for folders and files: a new study, a run again, its report, and a workload."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aioengine.cli.flags import CommonFlags, Given, Switch
from aioengine.cli.process import EXIT_FAILED
from aioengine.errors import ConfigError


def new(folder: Given, /, *, common: CommonFlags | None = None) -> int:
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


def report(
    folder: Given,
    /,
    *,
    rank_by: str | None = None,
    vector: Switch = False,
    common: CommonFlags | None = None,
) -> int:
    """Redraw the figures and report.html of a run or a comparison.

    Args:
        folder: The folder that was given to --out.
        rank_by: Measure that a comparison's policies are ranked by.
        vector: Write the figures as PDF and SVG too, and captions with all parameters.
    """
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    from aioengine.cli.lab.run import draw
    from aioengine.lab.analysis.measures import DEFAULT_RANKING
    from aioengine.lab.report.compare_page import write_compare_report
    from aioengine.lab.report.run_page import write_report

    if (folder / "comparison.json").exists():
        draw(lambda drawn: write_compare_report(folder, rank_by or DEFAULT_RANKING, drawn, vector=vector))
    elif not (folder / "experiment.json").exists():
        raise ConfigError(
            f"{folder}: has no experiment.json and no comparison.json; 'aioengine lab run' and "
            "'aioengine lab compare' write them into --out"
        )
    elif rank_by is not None:
        raise ConfigError(f"--rank-by {rank_by}: {folder} is a run, and has no ranking; leave it out")
    else:
        draw(lambda drawn: write_report(folder, drawn, vector=vector))
    return 0


def rerun(folder: Given, /, *, out: Path | None = None, common: CommonFlags | None = None) -> int:
    """Run the experiment of a folder again, and compare all files byte for byte.

    Exits with 1 if a file differs.

    Args:
        folder: The folder that was given to --out of lab run; it is only read.
        out: Folder for the new files (by default they are compared and deleted).
    """
    from aioengine.cli.lab.flags import check_out
    from aioengine.cli.lab.run import simulated
    from aioengine.cli.progress import progress
    from aioengine.lab.runs import provenance, simulate
    from aioengine.lab.workload.extra import check_extra

    check_extra()
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
    if not found.same:
        return EXIT_FAILED
    print("the same bytes")
    return 0


def workload(
    file: Given,
    /,
    *,
    seed: int = 0,
    limit: int | None = None,
    plot: Switch = False,
    out: Path | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Describe a workload: rates, lengths, popularity, and common beginnings of prompts.

    Args:
        file: TOML or JSON with the fields of a workload, an experiment.json, or a trace.
        seed: Seed of everything drawn.
        limit: Maximum requests to read (200,000).
        plot: Draw it, too: workload.png, .pdf and .svg in --out.
        out: Folder for --plot (lab-workload).
    """
    if out is not None and not plot:
        raise ConfigError(f"--out {out}: is for the files of --plot; give --plot")
    from aioengine.cli.tables import print_table
    from aioengine.lab.analysis.offered import MOST, describe_offered, read_offered
    from aioengine.lab.runs.effects import check_workload_effect, set_fields
    from aioengine.lab.workload.draw import OfferedWorkload
    from aioengine.lab.workload.extra import check_extra
    from aioengine.lab.workload.files import read_workload

    if plot:
        check_extra()
    spec = read_workload(file)
    check_workload_effect(spec, set_fields(spec))
    offered = read_offered(OfferedWorkload(spec, seed), MOST if limit is None else limit)
    found = describe_offered(offered)
    groups = [(name, value if isinstance(value, dict) else {"": value}) for name, value in found.items()]
    rows = [
        (f"{name} {of}" if of else name.replace("_", " "), _figure(name, number))
        for name, values in groups
        for of, number in values.items()
        if of or number is not None
    ]
    print_table(("figure", ">"), rows)
    if plot:
        from aioengine.lab.report.charts import images
        from aioengine.lab.report.workload_figure import workload_figure

        out = out or Path("lab-workload")
        out.mkdir(parents=True, exist_ok=True)
        for kind, data in images(workload_figure(offered), ("png", "pdf", "svg")).items():
            (out / f"workload.{kind}").write_bytes(data)
        (out / "workload.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"figure: {out / 'workload.png'}")
    return 0


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
