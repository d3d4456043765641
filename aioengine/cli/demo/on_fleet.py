"""``aioengine demo --replicas N``: the demo's requests on a fleet, which has no events of single engines."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from aioengine.cli.demo.board import Board, Row
from aioengine.errors import AioEngineError
from aioengine.fleet.config import FleetConfig
from aioengine.request import SamplingParams
from aioengine.tasks import end_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from rich.console import Console

    from aioengine.fleet.door.client import FleetClient
    from aioengine.info import SlotInfo

LOOK_SECONDS = 0.1


async def demo_on_fleet(config: FleetConfig, board: Board, params: SamplingParams, console: Console) -> int:
    """Start the fleet, send the board's requests one after the other, and show their progress, here and on
    the live page."""
    from aioengine.cli.demo.view import print_fleet_summary, result_line
    from aioengine.cli.fleet.started import started_fleet
    from aioengine.metrics.asgi import serve_page

    async with (
        started_fleet(config, lambda stage, done, total: None) as client,
        serve_page(client, port=0) as page,
    ):
        print(f"Live page, as long as the demo runs: {page}", flush=True)

        async def ask(row: Row) -> None:
            row.state, sent = "waiting", time.perf_counter()
            try:
                async for out in client.generate(
                    row.job.messages, params, adapter=row.job.adapter, request_id=row.job.id
                ):
                    if row.ttft is None and out.output_tokens:
                        row.ttft = time.perf_counter() - sent
                        row.state, row.admitted = "running", time.perf_counter()
                        row.replica = _number(client, client.replica_of(row.job.id))
                        board.say(
                            f"{row.job.id} runs on replica {row.replica}, first token after {row.ttft:.2f} s"
                        )
                    row.text, row.tokens = out.text, out.output_tokens
            except AioEngineError as error:
                row.state, row.error = "failed", str(error)
            else:
                row.state = "done"
                row.passed = None if row.job.check is None else row.job.check(row.text)
            row.ended = time.perf_counter()
            board.say(result_line(row))

        async with _watched(client, board, console):
            await board.ask_all(ask)
        print_fleet_summary(console, board, config.replicas, time.perf_counter() - board.begun)
    return 0 if board.all_finished else 1


@asynccontextmanager
async def _watched(client: FleetClient, board: Board, console: Console) -> AsyncIterator[None]:
    """Look at the slots at intervals: report moves, and redraw the board if there is a terminal."""
    from rich.live import Live

    from aioengine.cli.demo.view import live_board

    before: dict[tuple[str | None, int], str | None] = {}

    def look(live: Live | None) -> None:
        stats, replicas = client.stats(), list(client.members.members)
        for move in moved_since(before, stats.slots, replicas):
            board.moved(move)
        if live is not None:
            live.update(live_board(board, stats, replicas), refresh=True)

    async def always(live: Live | None) -> None:
        while True:
            look(live)
            await asyncio.sleep(LOOK_SECONDS)

    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        task = asyncio.create_task(always(live))
        try:
            yield
        finally:
            await end_tasks([task])
            look(live)


def moved_since(
    before: dict[tuple[str | None, int], str | None], slots: Iterable[SlotInfo], replicas: Sequence[str]
) -> list[str]:
    """Return the adapters that have come into slots since the last call with the same ``before``."""
    from aioengine.cli.demo.view import place_of

    found = []
    for slot in slots:
        key = slot.replica, slot.index  # replicas get other numbers when one leaves
        if slot.adapter is not None and before.get(key) != slot.adapter:
            found.append(f"{slot.adapter}: into {place_of(slot, replicas)}")
        before[key] = slot.adapter
    return found


def _number(client: FleetClient, replica: str | None) -> int:
    """Return a replica's place among the members, by which its slots are numbered."""
    return next((i for i, name in enumerate(client.members.members) if name == replica), -1)
