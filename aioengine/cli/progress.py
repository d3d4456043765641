"""Progress on standard error: bars at a terminal, and of long tasks a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from aioengine.config import EngineConfig
from aioengine.info import LoadProgress

if TYPE_CHECKING:
    from rich.console import Console

    from aioengine.engine import AsyncEngine

LINE_SECONDS = 10.0

Show = Callable[[float, float | None, str], None]
"""Shows how much is done, of how much (None: not known), and the current item."""


@asynccontextmanager
async def started(
    config: EngineConfig, adapters: Mapping[str, str], also: LoadProgress | None = None
) -> AsyncIterator[AsyncEngine]:
    """Context with a running engine and registered ``adapters`` (name -> path). The progress of loading is
    shown, and passed to ``also``."""
    from aioengine.engine import AsyncEngine

    engine = AsyncEngine(config)
    try:
        with load_progress() as shown:

            def progress(stage: str, done: int, total: int) -> None:
                for tell in (shown, also):
                    if tell is not None:
                        tell(stage, done, total)

            await engine.start(progress=progress)
        for name, path in adapters.items():
            engine.register_adapter(name, path)
        yield engine
    finally:
        await engine.stop()


@contextmanager
def load_progress() -> Iterator[LoadProgress | None]:
    """Context with a bar for each stage of loading a model; None where there is no terminal."""
    console = _terminal()
    if console is None:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=console, transient=True) as bars:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield show


@contextmanager
def progress(what: str, *, lines: bool = True) -> Iterator[Show]:
    """Context with a function that shows the progress of ``what``: where there is no terminal, in a line
    every few seconds, if ``lines``."""
    console = _terminal()
    if console is None:
        yield _Lines(what) if lines else lambda done, total, detail: None
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


def _terminal() -> Console | None:
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None
