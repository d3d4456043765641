"""``aioengine lab workload``: describes a workload before it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.errors import ConfigError

DEFAULT_OUT = Path("lab-workload")


def workload(
    file: Annotated[Path, Parameter(show_default=False)],
    /,
    *,
    seed: int = 0,
    limit: int | None = None,
    plot: Annotated[bool, Parameter(negative="")] = False,
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
    _print(found)
    if plot:
        from aioengine.lab.report.charts import images
        from aioengine.lab.report.workload_figure import workload_figure

        out = out or DEFAULT_OUT
        out.mkdir(parents=True, exist_ok=True)
        for kind, data in images(workload_figure(offered), ("png", "pdf", "svg")).items():
            (out / f"workload.{kind}").write_bytes(data)
        (out / "workload.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"figure: {out / 'workload.png'}")
    return 0


def _print(found: dict[str, Any]) -> None:
    from aioengine.cli.tables import new_table, output_console

    console = output_console()
    table = new_table(console, "figure", ">")
    for name, value in found.items():
        if isinstance(value, dict):
            for of, number in value.items():
                table.add_row(f"{name} {of}", _text(name, number))
        elif value is not None:
            table.add_row(name.replace("_", " "), _text(name, value))
    console.print(table)


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
