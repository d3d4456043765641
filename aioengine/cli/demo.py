"""``aioengine demo``: a small model, four adapters, two slots; and an example of embedding."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Literal

import msgspec
from rich.console import Console, Group

import aioengine
from aioengine.cli.board import Show, board, cut_table, slots_table
from aioengine.cli.flags import DEFAULT_MODEL, Count
from aioengine.cli.loop import run
from aioengine.cli.progress import started
from aioengine.cli.tables import output_console, print_table
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError, ConfigError
from aioengine.request import SamplingParams
from aioengine.tasks import end_tasks, together

ADAPTERS = ("sql", "json", "sentiment", "pirate")

_ORDER = (
    *(None, "sql", "json", "sql", None, "sentiment"),
    *("json", "pirate", None, "sentiment", "pirate", None),
)
"""Adapters in the order of the requests: more at a time than slots, and some more than once."""
_QUESTIONS = (
    "What is the capital of France?",
    "Name the three primary colours.",
    "Why is the sky blue? Answer in one sentence.",
    "Write two lines about the sea.",
)

ARRIVAL_SECONDS = 0.15
"""Seconds between the arrivals of two requests."""
LOOK_SECONDS = 0.1


def demo(
    *, adapters: Path | None = None, requests: Count = 12, max_tokens: int = 48, model: str = DEFAULT_MODEL
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
    folder = default_folder() if adapters is None else adapters
    rows = make_requests(folder, requests)
    config = EngineConfig(
        model=model,
        max_model_len=512,
        max_num_seqs=16,
        kv_cache_memory="256MiB",
        lora=LoRAConfig(max_loras=2, max_cpu_loras=3, max_lora_rank=8),
    )
    shown = Demo(rows, SamplingParams(max_tokens=max_tokens), output_console())
    return run(_demo(config, {name: str(folder / name) for name in ADAPTERS}, shown))


async def _demo(config: EngineConfig, adapters: dict[str, str], shown: Demo) -> int:
    print(f"Loading {config.model} ...", flush=True)
    async with started(config, adapters) as engine:
        return await shown.run(engine)


def default_folder() -> Path:
    """Return ``examples/adapters`` of the source checkout that this package belongs to."""
    return Path(aioengine.__file__).resolve().parent.parent / "examples" / "adapters"


def make_requests(folder: Path, count: int) -> list[Request]:
    """Make ``count`` requests, which are the same each time.

    Raises ConfigError if the adapters, or the tasks that they were trained on, are missing.
    """
    for name in ADAPTERS:
        if not (folder / name / "adapter_config.json").is_file():
            raise ConfigError(
                f"the demo's adapter {name!r} is not in {folder}: run the demo from a source "
                "checkout of aioengine, or give the folder with --adapters"
            )
    tasks = _load_tasks(folder.parent / "tasks.py").TASKS
    rng = random.Random(0)
    made: list[Request] = []
    for index in range(count):
        adapter = _ORDER[index % len(_ORDER)]
        number = sum(one.adapter == adapter for one in made)
        if adapter is None:
            question, check = _QUESTIONS[number % len(_QUESTIONS)], None
            messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        else:
            item = tasks[adapter].generate(rng, "eval")
            question, messages = item.prompt, tasks[adapter].messages(item)
            check = partial(tasks[adapter].check, item)
        name = f"{adapter or 'base'}-{number + 1}"
        made.append(Request(id=name, adapter=adapter, question=question, messages=messages, check=check))
    return made


def _load_tasks(path: Path) -> ModuleType:
    """Import ``examples/tasks.py`` by its path: the examples are not part of the package."""
    name = "_aioengine_example_tasks"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"the demo's tasks are not at {path}: put them beside the adapters")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@dataclass(kw_only=True)
class Request:
    """One request of the demo, and its progress."""

    id: str
    adapter: str | None
    """None is the base model."""
    question: str
    messages: list[dict[str, Any]]
    check: Callable[[str], bool] | None = None
    """Checks whether an answer is right; None where no program can tell."""

    state: Literal["soon", "waiting", "running", "done", "failed"] = "soon"
    text: str = ""
    tokens: int = 0
    ttft: float | None = None
    right: bool | None = None


class Demo:
    """The demo's requests, sent one after the other, and what is shown of them: a line for each event and, at
    a terminal, a live board below the lines."""

    def __init__(self, rows: list[Request], params: SamplingParams, console: Console) -> None:
        self.rows = rows
        self._params = params
        self._console = console
        self._in_slots: dict[int, str | None] = {}
        """Adapters by slot, when one looked last."""
        self._begun = time.perf_counter()

    async def run(self, client: AsyncEngine) -> int:
        """Send all requests and show them. Returns 0 if every request finished, else 1."""
        self._begun = time.perf_counter()
        with board(self._console) as show:

            async def redraw() -> None:
                while True:
                    self._draw(client, show)
                    await asyncio.sleep(LOOK_SECONDS)

            redrawing = asyncio.create_task(redraw())
            try:
                await together([self._ask(client, row, i) for i, row in enumerate(self.rows)])
            finally:
                await end_tasks([redrawing])
                self._draw(client, show)
        self._print_summary(client)
        return 0 if all(row.state == "done" for row in self.rows) else 1

    async def _ask(self, client: AsyncEngine, row: Request, index: int) -> None:
        """Run one client: send its prompt and read its answer."""
        await asyncio.sleep(index * ARRIVAL_SECONDS)
        sent = time.perf_counter()
        row.state = "waiting"
        try:
            async for out in client.generate(
                row.messages, self._params, adapter=row.adapter, request_id=row.id
            ):
                if row.ttft is None and out.output_tokens:
                    row.state, row.ttft = "running", time.perf_counter() - sent
                    self._say(f"{row.id} runs, first token after {row.ttft:.2f} s")
                row.text, row.tokens = " ".join(out.text.split()), out.output_tokens
        except AioEngineError as error:
            row.state, row.text = "failed", str(error)
            self._say(f"{row.id} failed: {error}")
            return
        row.state, row.right = "done", None if row.check is None else row.check(out.text)
        verdict = {True: " [right]", False: " [wrong]", None: ""}[row.right]
        self._say(f"{row.id} done{verdict}: {row.text}")

    def _say(self, line: str) -> None:
        print(f"{time.perf_counter() - self._begun:6.2f}  {line}", flush=True)

    def _draw(self, client: AsyncEngine, show: Show | None) -> None:
        """Say which adapters have moved, and draw the requests with the ends of their answers, and the
        slots."""
        slots = client.stats().slots
        for slot in slots:
            before, self._in_slots[slot.index] = self._in_slots.get(slot.index), slot.adapter
            for adapter, way in ((before, "out of"), (slot.adapter, "into")):
                if adapter is not None and before != slot.adapter:
                    self._say(f"{adapter}: {way} slot {slot.index}")
        if show is not None:
            requests = [
                {"request": row.id, "state": row.state, "answer": row.text[-60:] or row.question}
                for row in self.rows
            ]
            width = self._console.width
            table = slots_table([msgspec.structs.asdict(slot) for slot in slots], len(slots), width)
            show(Group(cut_table(requests, len(requests), width), "", table))

    def _print_summary(self, client: AsyncEngine) -> None:
        """Print a table of the adapters, and what the slots have done."""
        total, seconds = sum(row.tokens for row in self.rows), time.perf_counter() - self._begun
        title = f"{len(self.rows)} requests, {total} tokens in {seconds:.1f} s"
        columns = ("adapter", ">requests", ">finished", ">TTFT median", ">tokens", ">right answers")
        lines = []
        for name in dict.fromkeys(row.adapter for row in self.rows):
            rows = [row for row in self.rows if row.adapter == name]
            ttfts = [row.ttft for row in rows if row.ttft is not None]
            checked = [row.right for row in rows if row.right is not None]
            lines.append(
                (
                    name or "base",
                    str(len(rows)),
                    str(sum(row.state == "done" for row in rows)),
                    f"{median(ttfts) * 1e3:.0f} ms" if ttfts else "-",
                    str(sum(row.tokens for row in rows)),
                    f"{sum(checked)} of {len(checked)}" if checked else "-",
                )
            )
        print_table(columns, lines, title)
        stats = client.stats()
        asked = stats.slot_hits + stats.slot_misses
        print(
            f"{len(stats.slots)} slots: {stats.slot_loads} loads, {stats.slot_evictions} evictions; "
            f"{stats.slot_hits} of {asked} requests found their adapter in one; "
            f"{stats.cpu_loads} reads from disk, {stats.cpu_evictions} evictions from the CPU cache, "
            f"{stats.steps} steps"
        )
