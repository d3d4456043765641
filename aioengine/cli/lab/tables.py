"""The tables that the lab's commands end with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from aioengine.cli.tables import new_table, output_console

if TYPE_CHECKING:
    from rich.console import Console

    from aioengine.lab.report.compare_page import Ranking
    from aioengine.lab.report.compare_results import Compare


def print_summary(summary: dict[str, Any]) -> None:
    """Print the table at the end of a run."""
    from aioengine.lab.analysis.measures import MEASURES
    from aioengine.lab.analysis.summary import flatten

    console = output_console()
    table = new_table(console, "figure", ">")
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
    """Print a table for each setting of a comparison, the best policy first."""
    from aioengine.lab.report.compare_page import rankings

    console = output_console()
    shared = False
    for ranking in rankings(compare):
        table = _ranking_table(ranking, console, " ")
        if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
            table = _ranking_table(ranking, console, "\n")
        console.print(table)
        console.print()
        shared = shared or any("=" in row.place for row in ranking.rows)
    if shared:
        console.print("=: the seeds do not tell which of these is better (95%)", style="dim")


def _ranking_table(ranking: Ranking, console: Console, joint: str) -> Table:
    """Make the table of policies, with ``joint`` between a mean and its interval. The columns of figures
    are as wide as they need to be: Rich would break lines at no-break spaces too, between a number and its
    unit."""
    from aioengine.lab.analysis.numbers import policy_label

    table = new_table(console)
    table.title, table.show_edge, table.pad_edge = Text(ranking.title), False, False
    table.add_column("", no_wrap=True)
    table.add_column("policy", overflow="fold")
    texts = [[joint.join(filter(None, cell[:2])) for cell in row.cells] for row in ranking.rows]
    for head, column in zip(ranking.heads, zip(*texts, strict=True), strict=True):
        parts = [*head.split(), *(line for text in column for line in text.split("\n"))]
        table.add_column(head, justify="right", width=max(map(len, parts)))
    for row, cells in zip(ranking.rows, texts, strict=True):
        table.add_row(row.place, Text(policy_label(row.name)), *cells)
    return table
