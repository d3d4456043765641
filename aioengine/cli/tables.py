"""Tables: drawn for people at a terminal, plain lines for files and pipes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 160


class _OutputConsole(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # as print does; a console of rich would end the process


def output_console() -> Console:
    """Return a console on standard output; if it is no terminal, it is wide enough for a row on one line."""
    console = _OutputConsole()
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return _OutputConsole(width=_PLAIN_WIDTH)


def new_table(console: Console, *columns: str, title: str | None = None) -> Table:
    """Return a table with these columns; those that begin with ">" are for numbers. It has no frame if the
    output is no terminal, for grep and awk."""
    table = Table(title=title, title_justify="left", box=HEAVY_HEAD if console.is_terminal else None)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table with these columns, as :func:`new_table` makes it."""
    console = output_console()
    table = new_table(console, *columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
