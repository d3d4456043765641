"""``aioengine demo``: a small model, four adapters, two slots; and an example of embedding."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aioengine.cli.common import CommonFlags
from aioengine.cli.demo.board import Board, Row
from aioengine.cli.demo.jobs import ADAPTERS, default_folder, make_jobs
from aioengine.cli.flags import DEFAULT_MODEL
from aioengine.cli.loop import run
from aioengine.cli.tables import output_console
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import AioEngineError, ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.request import SamplingParams
from aioengine.tasks import end_tasks

if TYPE_CHECKING:
    from rich.console import Console

    from aioengine.engine import AsyncEngine


def demo(
    *,
    adapters: Path | None = None,
    requests: int = 12,
    max_tokens: int = 48,
    seed: int = 0,
    model: str = DEFAULT_MODEL,
    replicas: int | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Watch a small model serve four adapters through two slots.

    A dozen requests arrive one after the other, for the base model and for four adapters. Two
    adapters fit on the device and three in the CPU cache, so they have to be swapped while others
    generate. Exits with 0 if every request finished.

    Parameters
    ----------
    adapters
        Folder of the example adapters (examples/adapters of the source checkout).
    requests
        Number of requests (12).
    max_tokens
        Maximum tokens to generate for each (48).
    seed
        Which exercises the adapters get (0).
    model
        The base model, which the adapters must fit (smollm2-135m).
    replicas
        Engines behind one door, on Ray (one engine, and no Ray).
    """
    if requests < 1:
        raise ConfigError(f"--requests {requests}: must be >= 1")
    folder = default_folder() if adapters is None else adapters
    jobs = make_jobs(folder, requests, seed)
    config = EngineConfig(
        model=model,
        max_model_len=512,
        max_num_seqs=16,
        kv_cache_memory="256MiB",
        lora=LoRAConfig(max_loras=2, max_cpu_loras=3, max_lora_rank=8),
    )
    params = SamplingParams(max_tokens=max_tokens)
    console = output_console()

    def say(line: str) -> None:
        """Print one line, where there is no live board."""
        if not console.is_terminal:
            print(f"{time.perf_counter() - board.begun:6.2f}  {line}", flush=True)

    board = Board(jobs, say)
    if replicas is not None:
        from aioengine.cli.demo.on_fleet import demo_on_fleet

        paths = {name: str(folder / name) for name in ADAPTERS}
        fleet = FleetConfig(engine=config, replicas=replicas, adapters=paths)
        print(f"Starting {replicas} replicas of {model} on Ray ...", flush=True)
        return run(demo_on_fleet(fleet, board, params, console))
    return run(_demo(config, folder, board, params, console))


async def _demo(
    config: EngineConfig, folder: Path, board: Board, params: SamplingParams, console: Console
) -> int:
    from aioengine.cli.demo.view import print_summary, result_line
    from aioengine.cli.progress import started

    async def ask(row: Row) -> None:
        """Run one client: send its prompt and read its answer."""
        job = row.job
        try:
            outputs = engine.generate(job.messages, params, adapter=job.adapter, request_id=job.id)
            async for out in outputs:
                row.text = out.text
        except AioEngineError as error:
            row.state, row.error = "failed", str(error)
        else:
            row.passed = None if job.check is None else job.check(row.text)
        board.say(result_line(row))

    if not console.is_terminal:
        print(f"Loading {config.model} ...", flush=True)
    async with started(config, {name: str(folder / name) for name in ADAPTERS}) as engine:
        engine.add_listener(board.handle)
        async with _shown(console, board, engine):
            await board.ask_all(ask)
        print_summary(console, board, engine.stats(), time.perf_counter() - board.begun)
    return 0 if board.all_finished else 1


@asynccontextmanager
async def _shown(console: Console, board: Board, engine: AsyncEngine) -> AsyncIterator[None]:
    """Redraw the board ten times a second, if there is a terminal to draw it on.

    The loop draws it, not rich's thread: the engine's state may only be read on the loop.
    """
    if not console.is_terminal:
        yield
        return
    from rich.live import Live

    from aioengine.cli.demo.view import live_board

    async def redraw() -> None:
        while True:
            live.update(live_board(board, engine.stats()), refresh=True)
            await asyncio.sleep(0.1)

    with Live(console=console, auto_refresh=False) as live:
        task = asyncio.create_task(redraw())
        try:
            yield
        finally:
            await end_tasks([task])
            live.update(live_board(board, engine.stats()), refresh=True)
