"""The whole engine: its time around the model's steps, and its time to start."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.events import Event, StepFinished
from aioengine.kernels.cpu.shared_library import load
from aioengine.model import native, runner
from aioengine.model.files.folder import SINGLE
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.shared.engines import random_prompts, run_once, write_adapters
from benchmarks.shared.report import new_table

PROMPT, OUTPUT, ADAPTERS, RANK = 128, 64, 8, 16
RUNS = 3


class Stopwatch:
    """Sum of the times that a function of the package takes, from now on. By ``time.thread_time`` it is the
    processor time of the thread that calls it, which a busy machine changes less."""

    def __init__(self, owner: Any, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += clock() - start

        setattr(owner, name, timed)


class Watched(NamedTuple):
    """Parts of a step."""

    forward: Stopwatch
    """Model, with the tables for it."""
    again: Stopwatch
    """The model, where a step repeats the one before."""
    executed: Stopwatch
    """All that the thread of the steps does, in its processor time."""
    library: Stopwatch
    """The compiled step in it."""


async def engine_table(model: str, quantization: str) -> Table:
    """Make a table of the share of whole runs in the model's forward pass, and of the rest; "own" is the
    processor time of the event loop's thread and, after it, of the steps' thread beside the library, by
    step."""
    watched = Watched(
        Stopwatch(native.NativeForward, "forward"),
        Stopwatch(native.NativeForward, "decode_again"),
        Stopwatch(runner.ModelRunner, "execute", time.thread_time),
        Stopwatch(load(), "aio_step", time.thread_time),
    )
    spec = read_spec(resolve_model(model))
    title = f"the engine around the model, {PROMPT} + {OUTPUT} tokens, {quantization}: shares of the time"
    columns = ("running", "adapters", "tok/s", "model", "batches and sampling", "core and policy")
    table = new_table(title, *columns, "streams, loop", "own, ms a step", texts=0)
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(Path(folder), spec, ADAPTERS, RANK)
        for running in (32, 64):
            prompts = random_prompts(spec.vocab_size, running, PROMPT)
            async with AsyncEngine(_config(model, quantization, running)) as engine:
                for name, path in adapters.items():
                    await engine.load_adapter(name, path)
                for count in (0, ADAPTERS):
                    using = list(adapters)[:count] or [None]
                    runs = [await _run(engine, prompts, using, watched) for _ in range(RUNS + 1)][1:]
                    rate, loop, thread, *parts = (statistics.median(of) for of in zip(*runs, strict=True))
                    shares = [f"{part:.1%}" for part in parts]
                    own = f"{loop * 1e3:.2f} + {thread * 1e3:.2f}"
                    table.add_row(str(running), str(count), f"{rate:.0f}", *shares, own)
    return table


async def _run(
    engine: AsyncEngine, prompts: list[list[int]], adapters: Sequence[str | None], watched: Watched
) -> tuple[float, ...]:
    """Return tokens per second, the engine's own processor seconds by step in both threads, and the shares of
    the forward pass, the rest of the executor, the core, the rest."""
    steps: list[StepFinished] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepFinished):
            steps.append(event)

    remove = engine.add_listener(listen)
    before = [each.seconds for each in watched]
    start, loop = time.perf_counter(), time.thread_time()
    await run_once(engine, prompts, OUTPUT, adapters)
    wall, loop = time.perf_counter() - start, time.thread_time() - loop
    remove()
    forward, again, executed, library = (
        each.seconds - was for each, was in zip(watched, before, strict=True)
    )
    model = forward + again
    executor, core = sum(step.seconds for step in steps), sum(step.schedule_seconds for step in steps)
    parts = (model, executor - model, core, wall - executor - core)
    own = (loop / len(steps), (executed - library) / len(steps))
    return len(prompts) * OUTPUT / wall, *own, *(part / wall for part in parts)


def _config(model: str, quantization: str, running: int) -> EngineConfig:
    return EngineConfig(
        model=model,
        quantization=quantization,  # type: ignore[arg-type]
        max_model_len=PROMPT + OUTPUT,
        max_num_seqs=running,
        kv_cache_memory="1GiB",
        enable_prefix_caching=False,  # every run computes every prompt
        lora=LoRAConfig(max_loras=ADAPTERS, max_lora_rank=RANK),
    )


async def start_table(model: str, quantization: str) -> Table:
    """Measure the start of new processes up to the first token."""
    command = [sys.executable, "-m", "benchmarks.kernels.whole", model, quantization]
    runs: list[dict[str, float]] = []
    for _ in range(RUNS):
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    table = new_table(f"start, {quantization} (medians of {RUNS} processes)", "what", "ms")
    for what in runs[0]:
        table.add_row(what, f"{statistics.median(run[what] for run in runs) * 1e3:.1f}")
    return table


async def _start(model: str, quantization: str) -> dict[str, float]:
    """Return the seconds of each stage, without imports."""
    path = resolve_model(model)
    found: dict[str, float] = {}
    file = path if path.is_file() else path / SINGLE
    for _ in range(2):  # the second time out of the system's cache, as the engine reads it
        start = time.perf_counter()
        file.read_bytes()
        found["reading the weights' file"] = time.perf_counter() - start
    load, pack = Stopwatch(runner, "load_weights"), Stopwatch(native.NativeForward, "__init__")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    start = time.perf_counter()
    async with AsyncEngine(_config(model, quantization, 8)) as engine:
        entered = time.perf_counter()
        prompts = random_prompts(40_000, 6, PROMPT)
        latencies = [(await engine.complete(prompt, params)).ttft or 0.0 for prompt in prompts]
    found["reading the weights into the model"] = load.seconds
    found["rearranging or quantizing them"] = pack.seconds
    found["AsyncEngine entered"] = entered - start
    found["first token of the first request, since then"] = latencies[0]
    found["first token of the second to sixth request (median)"] = statistics.median(latencies[1:])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Starts an engine once; prints the seconds as JSON.")
    parser.add_argument("model")
    parser.add_argument("quantization")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(_start(arguments.model, arguments.quantization))))
