"""Progress of the lab's commands on standard error: a bar at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0

Show = Callable[[float, float | None, str], None]
"""Shows how much is done, of how much (None: not known), and the current item."""


@contextmanager
def progress(what: str) -> Iterator[Show]:
    """Context with a function that shows the progress of ``what``."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(what)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None, detail="")
        yield lambda done, total, detail: bars.update(task, completed=done, total=total, detail=detail)


class _Lines:
    """Progress for logs: nothing for a short task, else a line every few seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + LINE_SECONDS

    def __call__(self, done: float, total: float | None, detail: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            share = f" {done / total:.0%}" if total else ""
            print(f"{self._what}{share}: {detail}", file=sys.stderr, flush=True)
