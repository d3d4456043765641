"""Progress bars: on standard error, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.info import LoadProgress

if TYPE_CHECKING:
    from rich.console import Console


@asynccontextmanager
async def started(
    config: EngineConfig, adapters: Mapping[str, str], also: LoadProgress | None = None
) -> AsyncIterator[AsyncEngine]:
    """Context with a running engine and registered ``adapters`` (name -> path). The progress of loading is
    shown, and passed to ``also``."""
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
def batch_progress(total: int) -> Iterator[Callable[[], None]]:
    """Context with a function to call for each request that has ended; it shows their number.

    Shows nothing if the answers go to the terminal.
    """
    console = None if sys.stdout.isatty() else _terminal()
    if console is None:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("requests", total=total)
        yield lambda: bars.advance(task)


def _terminal() -> Console | None:
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None
