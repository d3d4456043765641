"""Lateness of the event loop while the engine generates on the CPU, by a ticker of 10 ms.

    python -m benchmarks.engine.loop_lag

32 requests at once over 8 random rank-16 adapters in 4 slots, so that adapters are read and swapped all
the time. Prints how late the ticks are, and the same for an idle loop.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.engine.workload import random_prompts, run_once

TICK = 0.01


async def tick(late: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + TICK
        await asyncio.sleep(TICK)
        late.append(loop.time() - due)


async def lateness(work: asyncio.Task[object]) -> list[float]:
    late: list[float] = []
    ticker = asyncio.create_task(tick(late))
    await work
    ticker.cancel()
    return sorted(late)


async def main() -> tuple[list[float], list[float], int]:
    model = "smollm2-135m"
    spec = read_spec(resolve_model(model))
    config = EngineConfig(
        model=model,
        max_model_len=256,
        kv_cache_memory="1GiB",
        enable_prefix_caching=False,
        lora=LoRAConfig(max_loras=4, max_cpu_loras=5, max_lora_rank=16),
        policy="fcfs:max_wait=0.2",
    )
    idle = await lateness(asyncio.create_task(asyncio.sleep(3)))
    prompts = random_prompts(spec.vocab_size, 32, 128)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncEngine(config) as engine:
            names: list[str | None] = [f"random-{i}" for i in range(8)]
            for i, name in enumerate(names):
                path = write_random_adapter(Path(folder) / str(i), spec, 16, seed=i)
                engine.register_adapter(str(name), path)
            await run_once(engine, prompts, 2, names)
            before = engine.stats().slot_loads
            busy = await lateness(asyncio.create_task(run_once(engine, prompts, 64, names)))
            swaps = engine.stats().slot_loads - before
    return idle, busy, swaps


if __name__ == "__main__":
    table = Table(title="10 ms ticker: late by, in ms")
    for heading in ("loop", "", "ticks", "median", "p99", "worst"):
        table.add_column(heading)
    for loop_name, factory in (("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop)):
        with asyncio.Runner(loop_factory=factory) as runner:
            idle, busy, swaps = runner.run(main())
        for name, late in (("idle", idle), (f"32 requests, {swaps} swaps", busy)):
            figures = (late[len(late) // 2], late[int(len(late) * 0.99)], late[-1])
            row = (f"{seconds * 1e3:.1f}" for seconds in figures)
            table.add_row(loop_name, name, str(len(late)), *row)
    Console().print(table)
