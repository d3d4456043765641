"""The engine around its model: host time, and long prompts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from aioengine import AsyncEngine, EngineConfig, SamplingParams
from aioengine.cli.bench import random_prompts, run_once
from aioengine.events import Event, StepFinished
from aioengine.kernels.cpu.shared_library import load
from aioengine.model import native, runner
from benchmarks.report import median, percentile
from benchmarks.runner import Calls
from benchmarks.shared.engines import OUTPUT, PROMPT, configuration, random_adapters, spec_of, started
from benchmarks.shared.stopwatch import Stopwatch


async def long_prompt(
    *, model: str = "smollm2-135m", prompt_tokens: int = 8000, targets: tuple[float, ...] = (0.2, 3600.0),
    rounds: int = 2,
) -> AsyncGenerator[Calls, None]:  # fmt: skip
    """How a long prompt slows down another stream, by max_step_seconds."""
    prompt = random.Random(0).choices(range(100, 40000), k=prompt_tokens)

    async def beside(target: float) -> dict[str, float]:
        alone: list[float] = []
        during: list[float] = []
        gaps, ended = alone, False

        async def bystander(engine: AsyncEngine) -> None:
            while not ended:
                last, started = time.perf_counter(), False
                own = random.choices(range(100, 40000), k=20)
                async for _ in engine.generate(own, SamplingParams(max_tokens=100, ignore_eos=True)):
                    now = time.perf_counter()
                    if started:
                        gaps.append(now - last)
                    last, started = now, True

        async with AsyncEngine(
            EngineConfig(model=model, max_step_seconds=target, kv_cache_memory="1GiB")
        ) as engine:
            streaming = asyncio.create_task(bystander(engine))
            await asyncio.sleep(2)
            gaps = during
            began = time.perf_counter()
            await engine.complete(prompt, SamplingParams(max_tokens=1))
            took, ended = time.perf_counter() - began, True
            await streaming
        return {
            "largest gap, ms": 1e3 * max(during),
            "p99, ms": 1e3 * percentile(during, 0.99),
            "median, ms": 1e3 * median(during),
            "median alone, ms": 1e3 * median(alone),
            "p99 alone, ms": 1e3 * percentile(alone, 0.99),
            "the prompt, s": took,
        }

    calls = {f"max_step_seconds {target:g}": partial(beside, target) for target in targets}
    yield Calls(f"A stream beside a prompt of {prompt_tokens:,} tokens", calls, rounds, warm_up=0)


async def host(
    *, model: str = "smollm2-135m", quantization: str = "none", running: tuple[int, ...] = (32, 64),
    adapters: int = 8, rounds: int = 3,
) -> AsyncGenerator[Calls, None]:  # fmt: skip
    """Host time of a step: shares of a run outside of the model, and processor time of both threads."""
    forward = Stopwatch(native.NativeDecoder, "forward")
    again = Stopwatch(native.NativeDecoder, "decode_again")
    executed = Stopwatch(runner.ModelRunner, "execute", time.thread_time)
    library = Stopwatch(load(), "aio_step", time.thread_time)
    steps: list[StepFinished] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepFinished):
            steps.append(event)

    async def run(
        engine: AsyncEngine, prompts: list[list[int]], names: Sequence[str | None]
    ) -> dict[str, float]:
        steps.clear()
        for watch in (forward, again, executed, library):
            watch.seconds = 0.0
        start, loop = time.perf_counter(), time.thread_time()
        rate, _ = await run_once(engine, prompts, OUTPUT, names)
        wall, loop = time.perf_counter() - start, time.thread_time() - loop
        in_model = forward.seconds + again.seconds
        in_executor, in_core = (
            sum(getattr(step, name) for step in steps) for name in ("seconds", "schedule_seconds")
        )
        return {
            "output tok/s": rate,
            "model, %": 100 * in_model / wall,
            "batches and sampling, %": 100 * (in_executor - in_model) / wall,
            "core and policy, %": 100 * in_core / wall,
            "streams and loop, %": 100 * (wall - in_executor - in_core) / wall,
            "loop's thread, ms a step": 1e3 * loop / len(steps),
            "steps' thread, ms a step": 1e3 * (executed.seconds - library.seconds) / len(steps),
        }

    with random_adapters(model, adapters) as paths:
        for count in running:
            config = configuration(model, slots=adapters, quantization=quantization, max_num_seqs=count)
            prompts = random_prompts(spec_of(model).vocab_size, count, PROMPT)
            async with started({0: config}, paths) as engines:
                engines[0].add_listener(listen)
                variants: dict[str, list[str | None]] = {"base": [None], f"{adapters} adapters": [*paths]}
                calls = {name: partial(run, engines[0], prompts, names) for name, names in variants.items()}
                yield Calls(f"{count} running, {PROMPT} + {OUTPUT} tokens, {quantization}", calls, rounds)


CASES = (long_prompt, host)
