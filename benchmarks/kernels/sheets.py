"""Tables that are measured row by row. Each row is written as soon as it is there, and a row that fails loses
no other one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from aioengine.errors import DeviceFault, DeviceLost
from aioengine.model.cuda.failures import device_error

SLOW = 1.3
"""From this multiple of its prediction on, a time is marked."""

Entry = dict[str, Any]
"""A line of a table that is being written: {"title", "columns"} begins one, {"cells"} is a row, {"error"} is
what failed, after the row that has failed or after the title."""


class Wrong(Exception):
    """A result that differs from the reference's; the message says by how much."""


class Row(NamedTuple):
    """A row: what is measured, as its first cells, and a function that returns the others."""

    case: tuple[str, ...]
    measure: Callable[[], Sequence[str]]


class Sheet(NamedTuple):
    """A table. ``rows`` may do work that they share before they yield the first."""

    title: str
    columns: tuple[str, ...]
    rows: Iterable[Row]


def measured(
    sheets: Iterable[Sheet], deadline: float = float("inf"), clock: Callable[[], float] = time.monotonic
) -> Iterator[Entry]:
    """Measure the sheets, an entry at a time; rows that begin after ``deadline`` are left out.

    A row that fails is followed by its error, and the next one is measured. Where the device has failed,
    nothing can be measured any more by this process: that is the last entry.
    """
    for sheet in sheets:
        yield {"title": sheet.title, "columns": list(sheet.columns)}
        try:
            for row in sheet.rows:
                if clock() > deadline:
                    yield {"error": "the time is over: later rows were not measured"}
                    return
                try:
                    yield {"cells": [*row.case, *row.measure()]}
                except Exception as error:
                    yield {"cells": [*row.case, "failed"]}
                    yield {"error": f"{', '.join(row.case)}: {_said(error)}"}
                    if _is_over(error):
                        return
        except Exception as error:
            yield {"error": _said(error)}
            if _is_over(error):
                return


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, Wrong) else f"{type(error).__name__}: {first[:300]}"


def _is_over(error: Exception) -> bool:
    return isinstance(device_error(error), (DeviceFault, DeviceLost))


def against(seconds: float, predicted: float | None, unit: float) -> tuple[str, str, str]:
    """Return the cells for a time, its prediction (None: nothing is predicted for this GPU), and the ratio of
    the two, which is bold from ``SLOW`` on. ``unit`` is the seconds of a unit."""
    digits = 2 if unit == 1e-3 else 1
    if predicted is None:
        return f"{seconds / unit:.{digits}f}", "", ""
    ratio = seconds / predicted
    shown = f"{ratio:.2f}"
    return (
        f"{seconds / unit:.{digits}f}",
        f"{predicted / unit:.{digits}f}",
        f"**{shown}**" if ratio > SLOW else shown,
    )


def markdown(entries: Iterable[Entry]) -> Iterator[str]:
    """Yield the lines of the tables; what failed stands below the table."""
    width, errors = 0, list[str]()
    for entry in entries:
        if "title" in entry:
            yield from _errors(errors)
            columns = entry["columns"]
            width = len(columns)
            yield from (f"### {entry['title']}", "", _line(columns), "|" + "---|" * width)
        elif "cells" in entry:
            cells = [*entry["cells"], *[""] * (width - len(entry["cells"]))]
            yield _line(cells)
        else:
            errors.append(entry["error"])
    yield from _errors(errors)


def _errors(errors: list[str]) -> Iterator[str]:
    yield ""
    for error in errors:
        yield f"- failed: {error}"
    if errors:
        yield ""
    errors.clear()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def read_entries(text: str) -> list[Entry]:
    """Return the entries that a process has written, a JSON object a line. A last line that it did not finish
    is left out."""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]
