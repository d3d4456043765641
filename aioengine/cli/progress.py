"""Progress bars on standard error, where that is a terminal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from aioengine.config import EngineConfig
from aioengine.info import LoadProgress

if TYPE_CHECKING:
    from rich.console import Console

    from aioengine.engine import AsyncEngine

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
def progress(what: str) -> Iterator[Show]:
    """Context with a function that shows the progress of ``what``."""
    console = _terminal()
    if console is None:
        yield lambda done, total, detail: None
        return
    from rich.progress import Progress, TextColumn

    detail = TextColumn("{task.fields[detail]}", style="dim", markup=False)
    with Progress(*Progress.get_default_columns(), detail, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None, detail="")
        yield lambda done, total, detail: bars.update(task, completed=done, total=total, detail=detail)


def _terminal() -> Console | None:
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None
