"""More adapters than slots, on a live engine.

Adapters are random, of rank 16, on all linears; prompts have 128 tokens and outputs 32. Except in ``share``,
requests arrive by a Poisson process at 60% of the rate that the engine takes with as many adapters as slots.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.lab.calibration.random_adapters import write_random_adapter
from benchmarks.report import median, percentile
from benchmarks.runner import Calls
from benchmarks.shared.engines import configuration, random_adapters, spec_of

MODEL = "smollm2-135m"
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32
WARM_UP, LOAD = 5.0, 0.6


class Arrival(NamedTuple):
    seconds: float
    """Seconds after the start."""
    prompt: list[int]
    adapter: str | None


def poisson(rate: float, seconds: float, names: Sequence[str | None], zipf: float = 0.0) -> list[Arrival]:
    """Draw arrivals at ``rate`` a second; adapter k of ``names`` has weight 1 / k^zipf (0: uniform)."""
    rng = random.Random(0)
    weights = [1 / (k + 1) ** zipf for k in range(len(names))]
    now, found = 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        prompt = [rng.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
        found.append(Arrival(now, prompt, rng.choices(names, weights)[0]))
    return found


async def replay(
    engine: AsyncEngine, arrivals: Sequence[Arrival], output_tokens: int = OUTPUT_TOKENS,
    warm_up: float = 0.0, tenant: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """Send ``arrivals`` when they are due. Returns figures of those after ``warm_up``."""
    first: list[float] = []
    gaps: list[float] = []
    tokens = 0
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()

    async def request(arrival: Arrival) -> None:
        nonlocal tokens
        times = first
        last = time.perf_counter()
        async for out in engine.generate(arrival.prompt, params, adapter=arrival.adapter, tenant=tenant):
            now = time.perf_counter()
            if arrival.seconds >= warm_up and out.token_ids_delta:
                times.append(now - last)
            times, last = gaps, now
            if now - start >= warm_up:
                tokens += len(out.token_ids_delta)

    before = engine.stats()
    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            await asyncio.sleep(max(arrival.seconds - (time.perf_counter() - start), 0))
            group.create_task(request(arrival))
    seconds, after = time.perf_counter() - start - warm_up, engine.stats()
    return {
        "output tok/s": tokens / seconds,
        "TTFT median, ms": 1e3 * median(first),
        "TTFT p99, ms": 1e3 * percentile(first, 0.99),
        "gap median, ms": 1e3 * median(gaps),
        "gap p99, ms": 1e3 * percentile(gaps, 0.99),
        "largest gap, ms": 1e3 * max(gaps, default=0.0),
        "slot copies": after.slot_loads - before.slot_loads,
        "reads": after.cpu_loads - before.cpu_loads,
    }


def _config(slots: int, cpu: int, rank: int = 16) -> EngineConfig:
    lora = LoRAConfig(max_loras=slots, max_cpu_loras=cpu, max_lora_rank=rank)
    return configuration(MODEL, max_model_len=256, lora=lora)


async def at_once(
    engine: AsyncEngine, names: Sequence[str | None], requests: int, zipf: float = 0.0
) -> dict[str, float]:
    """Send so many requests at once."""
    return await replay(engine, poisson(1e6, 4e-6 * requests, names, zipf)[:requests])


async def load_on(
    config: EngineConfig, adapters: Mapping[str, Path], rate: float, seconds: float, zipf: float
) -> dict[str, float]:
    """Start an engine, and send requests at ``rate``."""
    async with AsyncEngine(config) as engine:
        for name, path in adapters.items():
            engine.register_adapter(name, path)
        arrivals = poisson(rate, seconds + WARM_UP, list(adapters), zipf)
        return await replay(engine, arrivals, warm_up=WARM_UP)


async def rate_for(config: EngineConfig, adapters: Mapping[str, Path]) -> float:
    """Measure requests a second that leave the engine idle for a part of the time."""
    async with AsyncEngine(config) as engine:
        for name, path in adapters.items():
            await engine.load_adapter(name, path)
        await at_once(engine, list(adapters), 8)
        found = await at_once(engine, list(adapters), 64)
    return LOAD * found["output tok/s"] / OUTPUT_TOKENS


def first(adapters: Mapping[str, Path], count: int) -> dict[str, Path]:
    return dict(list(adapters.items())[:count])


async def cliff(
    *, counts: tuple[int, ...] = (4, 8, 12, 16, 32, 64), slots: tuple[int, ...] = (8,), cpu: int = 64,
    zipf: tuple[float, ...] = (0.0, 1.0), seconds: float = 30.0, rounds: int = 1,
) -> AsyncGenerator[Calls, None]:  # fmt: skip
    """Time to first token, gaps and throughput as adapters outgrow the slots.

    ``--slots 64 8 --counts 64 --rounds 3`` compares 64 adapters over 8 slots with all of them in slots.
    """
    with random_adapters(MODEL, max(*counts, *slots)) as adapters:
        rate = await rate_for(_config(min(slots), cpu), first(adapters, min(slots)))
        calls = {
            f"{count} over {size} slots, weights 1/k^{skew:g}": partial(
                load_on, _config(size, cpu), first(adapters, count), rate, seconds, skew
            )
            for skew, size, count in itertools.product(zipf, slots, counts)
        }
        yield Calls(
            f"{rate:.2f} requests a second, {cpu} adapters in the CPU cache", calls, rounds, warm_up=0
        )


async def share(
    *, adapters: int = 256, slots: int = 16, cpu: int = 256, requests: int = 64, rounds: int = 3
) -> AsyncGenerator[Calls, None]:
    """Throughput with many adapters by Zipf over few slots, beside that of the base model."""
    async with AsyncEngine(_config(slots, cpu)) as engine:
        with random_adapters(MODEL, adapters) as paths:
            for name, path in paths.items():
                engine.register_adapter(name, path)
            calls = {
                "base": lambda: at_once(engine, [None], requests),
                "adapters": lambda: at_once(engine, list(paths), requests, zipf=1.0),
            }
            yield Calls(f"{requests} requests at once, {adapters} adapters over {slots} slots", calls, rounds)


async def cold(*, rank: int = 128, reads: int = 4, rounds: int = 2) -> AsyncGenerator[Calls, None]:
    """Gaps of eight streams of the base model while large adapters are read from a cold disk."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write_random_adapter(Path(folder) / str(i), spec_of(MODEL), rank, seed=i, dtype="float32")
            for i in range(reads)
        ]
        async with AsyncEngine(_config(1, 8, rank)) as engine:

            async def streams(with_reads: bool) -> dict[str, float]:
                arrivals = [Arrival(0.0, list(range(100, 228)), None)] * 8
                stream = asyncio.create_task(replay(engine, arrivals, output_tokens=100))
                await asyncio.sleep(0.5)
                began = time.perf_counter()
                for i, path in enumerate(paths if with_reads else ()):
                    drop_from_page_cache(path)
                    await engine.load_adapter(f"big-{i}", path)
                took = time.perf_counter() - began
                found = await stream
                for i in range(reads if with_reads else 0):
                    await engine.unload_adapter(f"big-{i}")
                return {"largest gap, ms": found["largest gap, ms"], **found, "reads took, s": took}

            size = sum(file.stat().st_size for file in paths[0].iterdir()) / 1e6
            title = f"8 streams of the base model while {reads} adapters of {size:.0f} MB are read"
            yield Calls(title, {"no reads": lambda: streams(False), "reads": lambda: streams(True)}, rounds)


async def mixes(
    *, model: str = MODEL, pairs: int = 1000, at_a_time: int = 32, tokens: int = 100, rate: float = 2.0,
    seconds: float = 120.0, rounds: int = 3,
) -> AsyncGenerator[Calls, None]:  # fmt: skip
    """A tenant's latency beside another's long answers, for one adapter and for a thousand mixes in turn.

    The first has four adapters; there are 8 slots, and 16 places in the CPU cache. ``requests beside`` are
    those of the second: each of them is for another pair of weights, up to ``pairs``.
    """
    lora = LoRAConfig(max_loras=8, max_cpu_loras=16, max_lora_rank=16)
    config = configuration(model, max_model_len=256, lora=lora, policy="fair")
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with random_adapters(model, 6) as paths:
        async with AsyncEngine(config) as engine:
            for name, path in paths.items():
                engine.register_adapter(name, path)
            *own, one, other = paths

            async def beside(different: int) -> dict[str, float]:
                sent = itertools.count()

                async def flood() -> None:
                    for i in sent:
                        mix = {one: 0.5 + i % different / different, other: 0.5} if different else one
                        await engine.complete(list(range(100, 228)), params, adapter=mix, tenant="flood")

                async with asyncio.TaskGroup() as group:
                    flooding = [group.create_task(flood()) for _ in range(at_a_time)]
                    arrivals = poisson(rate, seconds, own)
                    found = await replay(engine, arrivals, warm_up=WARM_UP, tenant="measured")
                    for task in flooding:
                        task.cancel()
                p99 = {name: value for name, value in found.items() if "p99" in name}
                return {**p99, **found, "requests beside": next(sent)}

            title = f"{rate:g} requests a second beside {at_a_time} streams of {tokens} tokens"
            calls = {"one adapter": lambda: beside(0), f"{pairs:,} mixes": lambda: beside(pairs)}
            yield Calls(title, calls, rounds, warm_up=0)


def drop_from_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' clean pages (it may refuse silently)."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


CASES = (cliff, share, cold, mixes)
