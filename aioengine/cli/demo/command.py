"""``aioengine demo``: a small model, four adapters, two slots; and an example of embedding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from aioengine.cli.common import CommonFlags
from aioengine.cli.demo.board import Board, ReplicaOf
from aioengine.cli.demo.jobs import ADAPTERS, default_folder, make_jobs
from aioengine.cli.flags import DEFAULT_MODEL
from aioengine.cli.loop import run
from aioengine.cli.tables import output_console
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.request import SamplingParams
from aioengine.tasks import end_tasks

if TYPE_CHECKING:
    from rich.console import Console

    from aioengine.runtime.client import EngineClient

LOOK_SECONDS = 0.1

Opened = tuple["EngineClient", ReplicaOf]


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
    paths = {name: str(folder / name) for name in ADAPTERS}
    fleet = None if replicas is None else FleetConfig(engine=config, replicas=replicas, adapters=paths)
    console = output_console()

    def say(line: str) -> None:
        """Print one line, where there is no live board."""
        if not console.is_terminal:
            print(f"{board.seconds:6.2f}  {line}", flush=True)

    board = Board(jobs, say)
    opened = _engine(config, paths) if fleet is None else _fleet(fleet)
    return run(show(opened, board, SamplingParams(max_tokens=max_tokens), console))


@asynccontextmanager
async def _engine(config: EngineConfig, adapters: dict[str, str]) -> AsyncIterator[Opened]:
    from aioengine.cli.progress import started

    print(f"Loading {config.model} ...", flush=True)
    async with started(config, adapters) as engine:
        yield engine, lambda request_id: None


@asynccontextmanager
async def _fleet(config: FleetConfig) -> AsyncIterator[Opened]:
    """Context with a running fleet, and its live page."""
    from aioengine.cli.fleet.started import started_fleet
    from aioengine.metrics.asgi import serve_page

    print(f"Starting {config.replicas} replicas of {config.engine.model} on Ray ...", flush=True)
    async with (
        started_fleet(config, lambda stage, done, total: None) as client,
        serve_page(client, port=0) as page,
    ):
        print(f"Live page, as long as the demo runs: {page}", flush=True)
        yield client, client.replica_of


async def show(
    opened: AbstractAsyncContextManager[Opened], board: Board, params: SamplingParams, console: Console
) -> int:
    """Send the board's requests one after the other and show their progress, and tables at the end. Returns
    the command's exit status."""
    from rich.live import Live

    from aioengine.cli.demo.view import live_board, print_summary

    async with opened as (client, replica_of):
        # The loop draws, and not rich's thread: the engine's state may only be read on the loop.
        with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:

            def look() -> None:
                stats = client.stats()
                board.look(stats)
                if live is not None:
                    live.update(live_board(board, stats), refresh=True)

            async def look_always() -> None:
                while True:
                    look()
                    await asyncio.sleep(LOOK_SECONDS)

            looking = asyncio.create_task(look_always())
            try:
                await board.ask_all(client, params, replica_of)
            finally:
                await end_tasks([looking])
                look()
        print_summary(console, board, client.stats())
    return 0 if board.all_finished else 1
