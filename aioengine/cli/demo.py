"""``aioengine demo``: a small model, four adapters, two slots; and an example of embedding."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import msgspec
from rich.console import Group

import aioengine
from aioengine.cli.board import Show, board, cut_table, slots_table
from aioengine.cli.flags import DEFAULT_MODEL, Count
from aioengine.cli.loop import run
from aioengine.cli.progress import started
from aioengine.cli.request_lines import Defaults, Request, parse_lines
from aioengine.cli.tables import output_console
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError, ConfigError
from aioengine.tasks import end_tasks, together

EXAMPLES = Path(aioengine.__file__).resolve().parent.parent / "examples"
"""Of the source checkout that this package belongs to."""
REQUESTS = "demo.jsonl"
"""The requests, in a file beside the folder of the adapters that they name."""
ARRIVAL_SECONDS = 0.15
"""Seconds between the arrivals of two requests."""
LOOK_SECONDS = 0.1


def demo(
    *,
    adapters: Path | None = None,
    requests: Count = 12,
    max_tokens: Count = 48,
    model: str = DEFAULT_MODEL,
) -> int:
    """Watch a small model serve four adapters through two slots.

    A dozen requests arrive one after the other, for the base model and for four adapters. Two
    adapters fit on the device and three in the CPU cache, so they have to be swapped while others
    generate. Exits with 0 if every request finished.

    Args:
        adapters: Folder of the example adapters (examples/adapters of the source checkout).
        requests: Number of requests (12).
        max_tokens: Maximum tokens to generate for each (48).
        model: The base model, which the adapters must fit (smollm2-135m).
    """
    folder = EXAMPLES / "adapters" if adapters is None else adapters
    file = folder.parent / REQUESTS
    if not file.is_file():
        raise ConfigError(
            f"--adapters {folder}: there is no {REQUESTS} beside it: run the demo from a source checkout of "
            "aioengine, or give the folder of its adapters"
        )
    with file.open("rb") as lines:
        asked = parse_lines(lines, Defaults(fields={"max_tokens": max_tokens}), source=str(file))
    paths = {str(one.adapter): str(folder / str(one.adapter)) for one in asked if one.adapter is not None}
    config = EngineConfig(
        model=model,
        max_model_len=512,
        max_num_seqs=16,
        kv_cache_memory="256MiB",
        lora=LoRAConfig(max_loras=2, max_cpu_loras=3, max_lora_rank=8),
    )
    return run(_demo(config, paths, [Row(request) for request in islice(cycle(asked), requests)]))


@dataclass
class Row:
    """One request of the demo, and its progress."""

    request: Request
    state: str = "soon"
    text: str = ""
    tokens: int = 0


async def _demo(config: EngineConfig, adapters: dict[str, str], rows: Sequence[Row]) -> int:
    print(f"Loading {config.model} ...", flush=True)
    async with started(config, adapters) as engine:
        return await Demo(engine, rows).run()


class Demo:
    """The demo's requests, sent one after the other, and what is shown of them: a line for each event and, at
    a terminal, a live board below the lines."""

    def __init__(self, engine: AsyncEngine, rows: Sequence[Row]) -> None:
        self._engine = engine
        self._rows = rows
        self._console = output_console()
        self._in_slots: dict[int, str | None] = {}
        """Adapters by slot, when one looked last."""
        self._begun = time.perf_counter()

    async def run(self) -> int:
        """Send all requests and show them. Returns 0 if every request finished, else 1."""
        with board(self._console) as show:
            drawing = asyncio.create_task(self._draw_always(show))
            try:
                await together([self._ask(row, place) for place, row in enumerate(self._rows)])
            finally:
                await end_tasks([drawing])
            self._draw(show)
        stats, total = self._engine.stats(), sum(row.tokens for row in self._rows)
        asked = stats.slot_hits + stats.slot_misses
        print(
            f"{len(self._rows)} requests, {total} tokens in {time.perf_counter() - self._begun:.1f} s; "
            f"{len(stats.slots)} slots: {stats.slot_loads} copies, {stats.slot_evictions} evictions; "
            f"{stats.slot_hits} of {asked} requests found their adapter in one; "
            f"{stats.cpu_loads} reads from disk, {stats.cpu_evictions} evictions from the CPU cache"
        )
        return 0 if all(row.state == "done" for row in self._rows) else 1

    async def _ask(self, row: Row, place: int) -> None:
        """Run one client: send its prompt and read its answer."""
        await asyncio.sleep(place * ARRIVAL_SECONDS)
        request, row.state, sent = row.request, "waiting", time.perf_counter()
        try:
            async for out in self._engine.generate(request.prompt, request.params, adapter=request.adapter):
                if row.state == "waiting" and out.output_tokens:
                    row.state = "running"
                    self._say(f"{request.id} runs, first token after {time.perf_counter() - sent:.2f} s")
                row.text, row.tokens = " ".join(out.text.split()), out.output_tokens
        except AioEngineError as error:
            row.state, row.text = "failed", str(error)
        else:
            row.state = "done"
        self._say(f"{request.id} {row.state}: {row.text}")

    def _say(self, line: str) -> None:
        print(f"{time.perf_counter() - self._begun:6.2f}  {line}", flush=True)

    async def _draw_always(self, show: Show | None) -> None:
        while True:
            self._draw(show)
            await asyncio.sleep(LOOK_SECONDS)

    def _draw(self, show: Show | None) -> None:
        """Say which adapters have moved, and draw the requests with the ends of their answers, and the
        slots."""
        slots = self._engine.stats().slots
        for slot in slots:
            before, self._in_slots[slot.index] = self._in_slots.get(slot.index), slot.adapter
            for adapter, way in ((before, "out of"), (slot.adapter, "into")):
                if adapter is not None and before != slot.adapter:
                    self._say(f"{adapter}: {way} slot {slot.index}")
        if show is not None:
            requests = [
                {"request": str(row.request.id), "state": row.state, "answer": row.text[-60:]}
                for row in self._rows
            ]
            width = self._console.width
            table = slots_table([msgspec.structs.asdict(slot) for slot in slots], len(slots), width)
            show(Group(cut_table(requests, len(requests), width), "", table))
