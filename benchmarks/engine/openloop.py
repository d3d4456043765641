"""An open-loop load: requests arrive at a fixed rate, however fast the engine answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aioengine import AsyncEngine, SamplingParams
from benchmarks.shared.engines import ticking


class Arrival(NamedTuple):
    seconds: float
    """Seconds after the start."""
    prompt: list[int]
    adapter: str | None


@dataclass
class Measured:
    """Times of the requests that arrived after the warm-up, in seconds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Times between two outputs of a stream."""
    late: list[float] = field(default_factory=list)
    """Lateness of a 5 ms ticker on the event loop."""
    tokens: int = 0
    seconds: float = 0.0
    loads: int = 0
    """Copies into slots."""
    reads: int = 0


def poisson(
    rate: float,
    seconds: float,
    names: Sequence[str | None],
    *,
    prompt_tokens: int,
    zipf: float = 0.0,
    seed: int = 0,
) -> list[Arrival]:
    """Draw arrivals at ``rate`` per second; adapter k of ``names`` has weight 1 / k^zipf (0: uniform)."""
    rng = random.Random(seed)
    weights = [1 / (k + 1) ** zipf for k in range(len(names))]
    now, found = 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        prompt = [rng.randrange(100, 40_000) for _ in range(prompt_tokens)]
        found.append(Arrival(now, prompt, rng.choices(names, weights)[0]))
    return found


async def replay(
    engine: AsyncEngine, arrivals: Sequence[Arrival], *, output_tokens: int, warm_up: float = 0.0
) -> Measured:
    """Send ``arrivals`` when they are due and wait for all answers."""
    found = Measured()
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()

    async def request(arrival: Arrival) -> None:
        counted = arrival.seconds >= warm_up
        sent = last = time.perf_counter()
        first = True
        async for out in engine.generate(arrival.prompt, params, adapter=arrival.adapter):
            now = time.perf_counter()
            if counted and out.token_ids_delta:
                (found.ttft if first else found.gaps).append(now - (sent if first else last))
            first, last = False, now
            if now - start >= warm_up:
                found.tokens += len(out.token_ids_delta)

    before = engine.stats()
    async with ticking() as found.late, asyncio.TaskGroup() as group:
        for arrival in arrivals:
            await asyncio.sleep(max(arrival.seconds - (time.perf_counter() - start), 0))
            group.create_task(request(arrival))
    found.seconds = time.perf_counter() - start - warm_up
    after = engine.stats()
    found.loads = after.slot_loads - before.slot_loads
    found.reads = after.cpu_loads - before.cpu_loads
    return found
