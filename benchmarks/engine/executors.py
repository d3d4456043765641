"""Throughput of the executors, and how late the application's event loop is.

    python -m benchmarks.engine.executors                 # some three minutes on two idle cores
    python -m benchmarks.engine.executors --repeats 1     # one

The workload is that of `aioengine bench`: 32 requests at once, 128 random prompt tokens each, 64
greedy output tokens. A coroutine on the application's loop asks to be woken every 5 ms and notes how late it
is; then the same again while the application computes in pure Python in a thread, and holds the interpreter
lock for it. The variants take turns; medians over the repeats are printed, of the lateness its median and
99th percentile.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from aioengine import AsyncEngine, EngineConfig
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.shared.engines import random_prompts, run_once, started, ticking
from benchmarks.shared.report import arguments, console, new_table, percentile

APPLICATION = {False: "idle", True: "burns the GIL"}


class Run(NamedTuple):
    tokens_per_second: float
    ttft: float
    late_median: float
    """Seconds."""
    late_p99: float


@contextmanager
def burning() -> Iterator[None]:
    """Run a thread that computes in pure Python."""
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            sum(i * i for i in range(10_000))

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def measure(engine: AsyncEngine, prompts: list[list[int]], output_tokens: int, *, burn: bool) -> Run:
    async with ticking() as late:
        with burning() if burn else nullcontext():
            rate, ttft = await run_once(engine, prompts, output_tokens)
    return Run(rate, ttft, statistics.median(late), percentile(late, 0.99))


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    vocabulary = read_spec(resolve_model(args.model)).vocab_size
    prompts = random_prompts(vocabulary, args.requests, args.prompt_tokens)
    results: dict[tuple[str, bool], list[Run]] = {}
    configs = {
        name: EngineConfig(
            model=args.model,
            dtype=args.dtype,
            executor=name,
            max_model_len=args.prompt_tokens + args.output_tokens,
            max_num_seqs=args.requests,
            max_num_batched_tokens=max(2048, args.requests),
            kv_cache_memory="1GiB",
            enable_prefix_caching=False,  # every run computes every prompt
            lora=None,
        )
        for name in ("thread", "process")
    }
    async with started(configs) as engines:
        for engine in engines.values():
            await run_once(engine, prompts, 2)  # warm-up
        for _ in range(args.repeats):
            for burn in (False, True):
                for name, engine in engines.items():
                    run = await measure(engine, prompts, args.output_tokens, burn=burn)
                    results.setdefault((name, burn), []).append(run)
                    print(f"{name}, {APPLICATION[burn]}: {run.tokens_per_second:.1f} tok/s", flush=True)
    show(results, f"{args.requests} x {args.prompt_tokens} + {args.output_tokens} tokens, {args.model}")


def show(results: dict[tuple[str, bool], list[Run]], title: str) -> None:
    columns = ("executor", "application", "output tok/s", "TTFT", "tick late, median", "tick late, p99")
    table = new_table(f"{title}, {torch.get_num_threads()} threads", *columns, texts=2)
    middles = {
        variant: Run(*(statistics.median(values) for values in zip(*runs, strict=True)))
        for variant, runs in results.items()
    }
    for (name, burn), middle in sorted(middles.items(), key=lambda item: item[0][1]):
        table.add_row(
            name,
            APPLICATION[burn],
            f"{middle.tokens_per_second:.1f}",
            f"{middle.ttft:.2f} s",
            f"{middle.late_median * 1e3:.2f} ms",
            f"{middle.late_p99 * 1e3:.2f} ms",
        )
    console().print(table)
    for burn, application in APPLICATION.items():
        thread, process = middles["thread", burn], middles["process", burn]
        rate, late = process.tokens_per_second / thread.tokens_per_second, process.late_p99 / thread.late_p99
        print(f"Application {application}: process / thread is {rate:.2f} in tok/s, {late:.2f} in late p99.")


if __name__ == "__main__":
    asyncio.run(main())
