"""Engines to measure: started together, with random adapters and random prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from aioengine import AsyncEngine, EngineConfig
from aioengine.cli.bench import random_prompts, run_once
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.spec import ModelSpec
from aioengine.schedulers import SchedulerPolicy

__all__ = ["random_prompts", "run_once", "started", "ticking", "write_adapters"]

K = TypeVar("K")
TICK = 0.005


@asynccontextmanager
async def started(
    configs: Mapping[K, EngineConfig],
    adapters: Mapping[str, Path] | None = None,
    policies: Mapping[K, SchedulerPolicy] | None = None,
) -> AsyncIterator[dict[K, AsyncEngine]]:
    """Context with an engine for each configuration, all in this process, with ``adapters`` loaded.
    ``policies`` has those that a configuration cannot name."""
    async with AsyncExitStack() as stack:
        engines: dict[K, AsyncEngine] = {}
        for name, config in configs.items():
            made = AsyncEngine(config, (policies or {}).get(name))
            engine = engines[name] = await stack.enter_async_context(made)
            for adapter, path in (adapters or {}).items():
                await engine.load_adapter(adapter, path)
        yield engines


def write_adapters(folder: Path, spec: ModelSpec, count: int, rank: int = 16) -> dict[str, Path]:
    """Write random adapters on all linears; returns their folders by name."""
    return {f"random-{i}": write_random_adapter(folder / str(i), spec, rank, seed=i) for i in range(count)}


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """Collect how late each tick of a 5 ms ticker on the event loop was, in seconds."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - due)

    task = asyncio.create_task(tick())
    try:
        yield late
    finally:
        task.cancel()
