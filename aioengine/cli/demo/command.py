"""``aioengine demo``: a small model, four adapters, two slots; and an example of embedding."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import msgspec

from aioengine.cli.common import CommonFlags
from aioengine.cli.demo.jobs import ADAPTERS, Job, default_folder, make_jobs
from aioengine.cli.flags import DEFAULT_MODEL
from aioengine.cli.loop import run
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import AioEngineError, ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.request import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from aioengine.engine import AsyncEngine
    from aioengine.fleet.door.client import FleetClient

ARRIVAL_SECONDS = 0.15
"""Seconds between the arrivals of two requests."""
LOOK_SECONDS = 0.1
_COLOURS = {"base": "white", "sql": "cyan", "json": "yellow", "sentiment": "magenta", "pirate": "green"}
_MARKS = {"soon": "·", "waiting": "◌", "running": "▶", "done": "✔", "failed": "✘"}


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

    Args:
        adapters: Folder of the example adapters (examples/adapters of the source checkout).
        requests: Number of requests (12).
        max_tokens: Maximum tokens to generate for each (48).
        seed: Which exercises the adapters get (0).
        model: The base model, which the adapters must fit (smollm2-135m).
        replicas: Engines behind one door, on Ray (one engine, and no Ray).
    """
    from aioengine.cli.tables import output_console

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
    shown = Demo(jobs, SamplingParams(max_tokens=max_tokens), output_console())
    paths = {name: str(folder / name) for name in ADAPTERS}
    if replicas is None:
        return run(_on_engine(config, paths, shown))
    return run(demo_on_fleet(FleetConfig(engine=config, replicas=replicas, adapters=paths), shown))


async def _on_engine(config: EngineConfig, adapters: dict[str, str], shown: Demo) -> int:
    from aioengine.cli.progress import started

    print(f"Loading {config.model} ...", flush=True)
    async with started(config, adapters) as engine:
        return await shown.run(engine)


async def demo_on_fleet(config: FleetConfig, shown: Demo) -> int:
    """Start the fleet, and run the demo on it, here and on the live page."""
    from aioengine.cli.fleet.started import started_fleet
    from aioengine.metrics.asgi import serve_page

    print(f"Starting {config.replicas} replicas of {config.engine.model} on Ray ...", flush=True)
    async with (
        started_fleet(config, lambda stage, done, total: None) as client,
        serve_page(client, port=0) as page,
    ):
        print(f"Live page, as long as the demo runs: {page}", flush=True)
        return await shown.run(client)


@dataclass
class Row:
    """One request and its progress."""

    job: Job
    state: Literal["soon", "waiting", "running", "done", "failed"] = "soon"
    text: str = ""
    tokens: int = 0
    ttft: float | None = None
    running: float = 0.0
    """Seconds from its first token to its end."""
    passed: bool | None = None

    @property
    def tail(self) -> str:
        """The end of its answer, or its question."""
        text = " ".join((self.text or self.job.question).split())
        if self.state in ("soon", "waiting"):
            return f"? {text}"
        return text if len(text) <= 60 or self.state == "failed" else f"…{text[-59:]}"


class Demo:
    """The demo's requests, sent one after the other, and what is shown of them: a live board or, where there
    is no terminal, a line for each event."""

    def __init__(self, jobs: list[Job], params: SamplingParams, console: Console) -> None:
        self.rows = [Row(job) for job in jobs]
        self._params = params
        self._console = console
        self._moves: deque[str] = deque(maxlen=3)
        self._in_slots: dict[tuple[str | None, int], str | None] = {}
        """Adapters by replica and slot, when one looked last."""
        self._begun = time.perf_counter()

    async def run(self, client: AsyncEngine | FleetClient) -> int:
        """Send all requests and show them. Returns 0 if every request finished, else 1."""
        from aioengine.cli.board import redrawn

        self._begun = time.perf_counter()
        async with (
            redrawn(self._console, lambda: self.draw(client), LOOK_SECONDS),
            asyncio.TaskGroup() as group,
        ):
            for index, row in enumerate(self.rows):
                group.create_task(self._ask(client, row, index * ARRIVAL_SECONDS))
        self._print_summary(client)
        return 0 if all(row.state == "done" for row in self.rows) else 1

    async def _ask(self, client: AsyncEngine | FleetClient, row: Row, delay: float) -> None:
        """Run one client: send its prompt and read its answer."""
        await asyncio.sleep(delay)
        job, sent = row.job, time.perf_counter()
        row.state = "waiting"
        try:
            async for out in client.generate(
                job.messages, self._params, adapter=job.adapter, request_id=job.id
            ):
                if row.ttft is None and out.output_tokens:
                    row.state, row.ttft = "running", time.perf_counter() - sent
                    self.say(f"{job.id} runs, first token after {row.ttft:.2f} s")
                row.text, row.tokens = out.text, out.output_tokens
        except AioEngineError as error:
            row.state, row.text = "failed", str(error)
            self.say(f"{job.id} failed: {error}")
            return
        row.state, row.running = "done", time.perf_counter() - sent - (row.ttft or 0.0)
        row.passed = None if job.check is None else job.check(row.text)
        verdict = {True: " [right]", False: " [wrong]", None: ""}[row.passed]
        self.say(f"{job.id} done{verdict}: {' '.join(row.text.split())}")

    def say(self, line: str) -> None:
        """Print one line, where there is no live board."""
        if not self._console.is_terminal:
            print(f"{time.perf_counter() - self._begun:6.2f}  {line}", flush=True)

    def draw(self, client: AsyncEngine | FleetClient) -> RenderableType:
        """Draw the requests with the ends of their answers, the slots, and the latest adapter moves."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        from aioengine.cli.board import slots_table

        slots = client.stats().slots
        for slot in slots:
            place = slot.replica, slot.index
            before, self._in_slots[place] = self._in_slots.get(place), slot.adapter
            for adapter, way in ((before, "out of"), (slot.adapter, "into")):
                if adapter is not None and before != slot.adapter:
                    where = f"slot {slot.index}" + (f" of {slot.replica}" if slot.replica else "")
                    self._moves.append(f"{adapter}: {way} {where}")
                    self.say(self._moves[-1])
        requests = Table.grid(padding=(0, 1), expand=True)
        requests.add_column(width=1)
        requests.add_column(width=12, no_wrap=True)
        requests.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for row in self.rows:
            dim = "" if row.state in ("running", "failed") else "dim "
            name = Text(row.job.id, style=f"{dim}{_COLOURS.get(row.job.adapter or 'base', 'blue')}")
            text = Text(row.tail, style="red" if row.state == "failed" else dim.strip())
            requests.add_row(_MARKS[row.state], name, text)
        table = slots_table([msgspec.structs.asdict(slot) for slot in slots], len(slots), self._console.width)
        moves = Text("\n".join(self._moves), style="dim")
        return Group(
            Panel(requests, title="requests", title_align="left", border_style="dim"),
            Panel(table, title="slots", title_align="left", border_style="dim"),
            Panel(moves, title="adapter moves", title_align="left", border_style="dim", height=5),
        )

    def _print_summary(self, client: AsyncEngine | FleetClient) -> None:
        """Print a table of the adapters, and what the slots have done."""
        from aioengine.cli.tables import new_table

        total, seconds = sum(row.tokens for row in self.rows), time.perf_counter() - self._begun
        table = new_table(
            self._console,
            *("adapter", ">requests", ">finished", ">TTFT median", ">tokens", ">tokens/s", ">right answers"),
            title=f"{len(self.rows)} requests, {total} tokens in {seconds:.1f} s",
        )
        table.caption = "tokens/s: of one request while it runs"
        for name in dict.fromkeys(row.job.adapter for row in self.rows):
            rows = [row for row in self.rows if row.job.adapter == name]
            ttfts = [row.ttft for row in rows if row.ttft is not None]
            tokens, running = sum(row.tokens for row in rows), sum(row.running for row in rows)
            checked = [row.passed for row in rows if row.passed is not None]
            table.add_row(
                name or "base",
                str(len(rows)),
                str(sum(row.state == "done" for row in rows)),
                f"{median(ttfts) * 1e3:.0f} ms" if ttfts else "-",
                str(tokens),
                f"{tokens / running:.1f}" if running > 0 else "-",
                f"{sum(checked)} of {len(checked)}" if checked else "-",
            )
        self._console.print(table)
        stats = client.stats()
        found = stats.slot_hits, stats.slot_hits + stats.slot_misses
        print(
            f"{len(stats.slots)} slots: {stats.slot_loads} loads, {stats.slot_evictions} evictions; "
            f"{found[0]} of {found[1]} requests found their adapter in one; "
            f"{stats.cpu_loads} reads from disk, {stats.cpu_evictions} evictions from the CPU cache, "
            f"{stats.steps} steps"
        )
