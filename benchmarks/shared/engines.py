"""Engines to measure: started together, with random adapters and random prompts."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from aioengine import AsyncEngine, EngineConfig, SamplingParams
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.spec import ModelSpec
from aioengine.schedulers import SchedulerPolicy

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


def random_prompts(
    vocabulary: int, requests: int, tokens: int, rng: random.Random | None = None
) -> list[list[int]]:
    """Draw prompts of random token ids; they are the same in each run."""
    rng = random.Random(0) if rng is None else rng
    return [[rng.randrange(100, vocabulary - 100) for _ in range(tokens)] for _ in range(requests)]


def write_adapters(folder: Path, spec: ModelSpec, count: int, rank: int = 16) -> dict[str, Path]:
    """Write random adapters on all linears; returns their folders by name."""
    return {f"random-{i}": write_random_adapter(folder / str(i), spec, rank, seed=i) for i in range(count)}


async def run_once(
    engine: AsyncEngine,
    prompts: list[list[int]],
    output_tokens: int,
    adapters: Sequence[str | None] = (None,),
) -> tuple[float, float]:
    """Return (output tokens per second, median TTFT in seconds) of all prompts at once; request i uses
    adapter i % n of n."""
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = await asyncio.gather(
        *(
            engine.complete(prompt, params, adapter=adapters[i % len(adapters)])
            for i, prompt in enumerate(prompts)
        )
    )
    seconds = time.perf_counter() - start
    assert all(len(out.token_ids) == output_tokens for out in outputs)
    ttft = statistics.median(out.ttft or 0.0 for out in outputs)
    return len(prompts) * output_tokens / seconds, ttft


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
