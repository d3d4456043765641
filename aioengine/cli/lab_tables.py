"""The tables that the lab's commands end with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from aioengine.cli.tables import box_for, output_console

if TYPE_CHECKING:
    from aioengine.lab.compare_figures import Compare


def print_summary(summary: dict[str, Any]) -> None:
    """The table at the end of a run."""
    from aioengine.lab.measures import MEASURES
    from aioengine.lab.summary import flatten

    console = output_console()
    table = Table(box=box_for(console))
    table.add_column("figure")
    table.add_column("", justify="right")
    flat = flatten(summary)
    for measure in MEASURES:
        if flat.get(measure.name) is not None:
            table.add_row(measure.label, measure.text(flat[measure.name]))
    console.print(table)
    errors = summary["requests_by_error"]
    if errors:
        each = ", ".join(f"{count:,} {error}" for error, count in errors.items())
        print(f"aioengine: not all requests were served: {each}", file=sys.stderr)


def print_rankings(compare: Compare) -> None:
    """A table for each setting of a comparison: best first."""
    from aioengine.lab.compare_report import rankings

    console = output_console()
    for ranking in rankings(compare):
        table = Table(title=Text(ranking.title), title_justify="left", box=box_for(console))
        table.add_column("")
        table.add_column("policy", overflow="fold")
        for head in ranking.heads:
            table.add_column(head, justify="right")
        for place, row in enumerate(ranking.rows, 1):
            cells = [f"{cell.value} {cell.interval or ''}".rstrip() for cell in row.cells]
            table.add_row(str(place), Text(row.policy), *cells)
        console.print(table)
