"""Waiting for what another task, thread or process brings about."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable

SECONDS = 60.0
"""A test fails after this long. What it waits for takes milliseconds, but not on a machine that is busy."""


async def until(condition: Callable[[], bool]) -> None:
    """Return once ``condition()`` is true, and let the loop go on meanwhile. Otherwise fail, and say what was
    awaited."""
    try:
        async with asyncio.timeout(SECONDS):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        what = inspect.getsource(condition).strip()
        raise AssertionError(f"waited in vain for {SECONDS:g} s: {what}") from None
