"""Running a coroutine on uvloop, without touching the process-wide event loop policy."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from aioengine.cli.process import process

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end on a uvloop loop (on asyncio's own where uvloop is not available).

    Ctrl-C cancels it. Raises KeyboardInterrupt if that has ended it.
    """
    with asyncio.Runner(loop_factory=None if sys.platform == "win32" else _uvloop) as runner:
        try:
            return runner.run(_cancellable(main))
        except asyncio.CancelledError:
            if not process.interrupted:
                raise
            raise KeyboardInterrupt from None


async def _cancellable(main: Coroutine[Any, Any, T]) -> T:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    with process.cancelling(lambda: loop.call_soon_threadsafe(task.cancel)):
        return await main


def _uvloop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()
