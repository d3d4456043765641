"""Progress bars on standard error, where that is a terminal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn

from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.info import LoadProgress

Show = Callable[[float, float | None, str], None]
"""Shows how much is done, of how much (None: not known), and the current item."""


@asynccontextmanager
async def started(
    config: EngineConfig,
    adapters: Mapping[str, str],
    *,
    also: LoadProgress | None = None,
    record: Path | None = None,
) -> AsyncIterator[AsyncEngine]:
    """Context with a running engine and registered ``adapters`` (name -> path). The progress of loading is
    shown, and passed to ``also``. The requests are recorded in the file ``record``, those included that end
    with the engine. Raises ConfigError, before anything slow, if it cannot be written."""
    async with AsyncExitStack() as stack:
        writer = None
        if record is not None:
            from aioengine.lab.runs.trace_writer import TraceWriter

            writer = await stack.enter_async_context(TraceWriter(record))
        engine = AsyncEngine(config)
        stack.push_async_callback(engine.stop)
        with load_progress() as show:

            def progress(stage: str, done: int, total: int) -> None:
                show(stage, done, total)
                if also is not None:
                    also(stage, done, total)

            await engine.start(progress=progress)
        for name, path in adapters.items():
            engine.register_adapter(name, path)
        if writer is not None:
            writer.attach(engine)
        yield engine


@contextmanager
def load_progress() -> Iterator[LoadProgress]:
    """Context with a function that shows the progress of loading a model."""
    with progress("loading") as show:
        yield lambda stage, done, total: show(done, total, stage)


@contextmanager
def progress(what: str) -> Iterator[Show]:
    """Context with a function that shows the progress of ``what``."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda done, total, detail: None
        return
    detail = TextColumn("{task.fields[detail]}", style="dim", markup=False)
    with Progress(*Progress.get_default_columns(), detail, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None, detail="")
        yield lambda done, total, detail: bars.update(task, completed=done, total=total, detail=detail)
