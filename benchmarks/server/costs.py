"""What the HTTP server and its metrics cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from functools import partial

from prometheus_client import generate_latest

from aioengine import EngineConfig, LoRAConfig, SamplingParams
from aioengine.cli.bench import random_prompts, run_once
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from benchmarks.fleet.servers import served, throughput
from benchmarks.runner import Calls
from benchmarks.shared.engines import OUTPUT, PROMPT, configuration, random_adapters, started


async def serving(
    *, model: str = "smollm2-135m", streams: int = 64, adapters: int = 8, rounds: int = 3
) -> AsyncGenerator[Calls, None]:
    """The same load streamed through ``aioengine serve`` and on an embedded engine, one thread each.

    The client runs in this process, and takes processor time from the model where cores are few.
    """
    prompts = random_prompts(21_000, streams, PROMPT)
    with random_adapters(model, adapters) as paths:
        flags = ["--max-loras", str(adapters), "--max-num-seqs", str(streams), "--lora-modules"]
        flags += [f"{name}={path}" for name, path in paths.items()]
        config = configuration(model, slots=adapters, max_num_seqs=streams)
        with served(model, *flags) as server:
            async with started({0: config}, paths) as engines:

                async def embedded() -> dict[str, float]:
                    began = time.thread_time()
                    rate, _ = await run_once(engines[0], prompts, OUTPUT, list(paths))
                    own = 1e6 * (time.thread_time() - began) / (streams * OUTPUT)
                    return {"output tok/s": rate, "event loop, us/token": own}

                calls = {
                    "embedded": embedded,
                    "served": partial(throughput, server, streams, OUTPUT, tuple(paths)),
                }
                yield Calls(f"{streams} streams over {adapters} adapters", calls, rounds)


def metrics(
    *, adapters: int = 1000, running: int = 256, slots: int = 32, labels: int = 100, rounds: int = 3
) -> Iterator[Calls]:
    """Metrics: processor time of an engine's steps with and without them (the device is simulated), and a
    scrape.

    Each adapter has served a request before, and 256 requests for those in slots decode 128 tokens.
    """
    costs = load_costs("llama3-8b-h100")
    lora = LoRAConfig(max_loras=slots, max_cpu_loras=adapters)
    config = EngineConfig(model="llama3-8b-h100", lora=lora, max_num_seqs=running, max_adapter_labels=labels)
    names = [f"adapter-{index:04d}" for index in range(adapters)]
    last: list[SimulatedEngine] = []

    async def steps(with_metrics: bool) -> dict[str, float]:
        async with SimulatedEngine(config, costs, metrics=with_metrics) as engine:
            engine.add_adapters([AdapterShape(name, 16) for name in names])
            short, long = SamplingParams(max_tokens=2), SamplingParams(max_tokens=128)
            await asyncio.gather(*(engine.complete([0] * 8, short, adapter=name) for name in names))
            before, began = engine.stats().steps, time.process_time()
            asked = (engine.complete([0] * 8, long, adapter=names[i % slots]) for i in range(running))
            await asyncio.gather(*asked)
            used, count = time.process_time() - began, engine.stats().steps - before
            last[:] = [engine]
        return {"us a step": 1e6 * used / count, "steps": count}

    kinds = {"without metrics": False, "with metrics": True}
    calls = {name: lambda kind=kind: run_in_virtual_time(steps(kind)) for name, kind in kinds.items()}
    title = f"{adapters:,} adapters, {slots} slots, {running} running, {labels} labels"
    yield Calls(f"Steps: {title}", calls, rounds)
    made = last[0].metrics

    def silent(work: object) -> None:
        """Forget what a call returns, which is no figure."""

    scrapes = {
        "on the event loop": lambda: silent(made.families()),
        "in all": lambda: silent(made.expose()),
        "OpenMetrics": lambda: silent(made.expose("application/openmetrics-text")),
        "prometheus_client": lambda: silent(generate_latest(made.registry)),
    }
    yield Calls(f"A scrape of {len(made.expose()[0].splitlines()):,} lines", scrapes, 10 * rounds)


CASES = (serving, metrics)
