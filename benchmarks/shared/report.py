"""Tables and flags of measurements."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from aioengine.lab.calibration.calibrate import cpu_name

__all__ = ["arguments", "console", "cpu_name", "new_table", "percentile"]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help is a module's docstring, as it is written there."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def new_table(title: str, *columns: str, texts: int = 1) -> Table:
    """Make a table whose first ``texts`` columns are texts, and the others numbers."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < texts else "right")
    return table


def console(width: int = 120) -> Console:
    """Return the terminal, or a console of ``width`` characters where the output is no terminal."""
    return Console(width=None if Console().is_terminal else width)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of all are not above; NaN without values."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float("nan")
