"""``aioengine demo``: a small model, four adapters, two slots; and an example of embedding."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import aioengine
from aioengine.cli.flags import DEFAULT_MODEL, Count
from aioengine.cli.loop import run
from aioengine.cli.progress import started
from aioengine.cli.request_lines import Defaults, Request, parse_lines
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import AioEngineError, ConfigError
from aioengine.events import AdapterEvicted, AdapterPlaced, Event
from aioengine.tasks import together

EXAMPLES = Path(aioengine.__file__).resolve().parent.parent / "examples"
"""Of the source checkout that this package belongs to."""
REQUESTS = "demo.jsonl"
"""The requests, in a file beside the folder of the adapters that they name."""
ARRIVAL_SECONDS = 0.15
"""Seconds between the arrivals of two requests."""


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
        requests: Number of requests.
        max_tokens: Maximum tokens to generate for each.
        model: The base model, which the adapters must fit.
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
    return run(_demo(config, paths, [*islice(cycle(asked), requests)]))


async def _demo(config: EngineConfig, adapters: dict[str, str], requests: Sequence[Request]) -> int:
    """Send the requests one after the other, and print a line for each event. Returns 0 if all finished."""
    print(f"Loading {config.model} ...", flush=True)
    async with started(config, adapters) as engine:
        begun = time.perf_counter()

        def say(line: str) -> None:
            print(f"{time.perf_counter() - begun:6.2f}  {line}", flush=True)

        def moved(event: Event) -> None:
            with suppress(OSError):  # output that cannot be written ends the requests, which write more
                match event:
                    case AdapterPlaced():
                        say(f"{event.adapter}: into slot {event.slot}")
                    case AdapterEvicted(level="slot"):
                        say(f"{event.adapter}: out of slot {event.slot}")

        async def ask(request: Request, place: int) -> int | None:
            """Run one client. Returns the number of its answer's tokens; None if it failed."""
            await asyncio.sleep(place * ARRIVAL_SECONDS)
            sent, text, tokens = time.perf_counter(), "", 0
            try:
                async for out in engine.generate(request.prompt, request.params, adapter=request.adapter):
                    if out.output_tokens and not tokens:
                        say(f"{request.id} runs, first token after {time.perf_counter() - sent:.2f} s")
                    text, tokens = " ".join(out.text.split()), out.output_tokens
            except AioEngineError as error:
                say(f"{request.id} failed: {error}")
                return None
            say(f"{request.id} done: {text}")
            return tokens

        engine.add_listener(moved, AdapterPlaced, AdapterEvicted)
        answers = await together([ask(request, place) for place, request in enumerate(requests)])
        stats, seconds = engine.stats(), time.perf_counter() - begun
        asked = stats.slot_hits + stats.slot_misses
        print(
            f"{len(requests)} requests, {sum(filter(None, answers))} tokens in {seconds:.1f} s; "
            f"{len(stats.slots)} slots: {stats.slot_loads} copies, {stats.slot_evictions} evictions; "
            f"{stats.slot_hits} of {asked} requests found their adapter in one; "
            f"{stats.cpu_loads} reads from disk, {stats.cpu_evictions} evictions from the CPU cache"
        )
        return 1 if None in answers else 0
