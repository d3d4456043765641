"""Output tokens per second with and without overlapping steps, in turns.

    python -m benchmarks.engine.overlap
    python -m benchmarks.engine.overlap --requests 1 32 --rounds 9

Two engines on the same model, one with ``overlap``, answer the same prompts in turns. The table has the
median of the pairs' ratios, and the lower and the upper quartile.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, SamplingParams

MODES = (False, True)


async def seconds(engine: AsyncEngine, prompts: list[list[int]], output_tokens: int) -> float:
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()
    await asyncio.gather(*(engine.complete(prompt, params) for prompt in prompts))
    return time.perf_counter() - start


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    table = Table(title=f"{args.model}, {args.output_tokens} output tokens each, {args.rounds} rounds")
    for column in ("requests", "tok/s without", "tok/s with overlap", "ratio", "quartiles"):
        table.add_column(column, justify="right")
    rng = random.Random(0)
    for count in args.requests:
        prompts = [[rng.randrange(100, 40_000) for _ in range(32)] for _ in range(count)]
        engines = {
            mode: AsyncEngine(
                EngineConfig(
                    model=args.model,
                    dtype="bfloat16",
                    quantization=args.quantization,
                    overlap=mode,
                    max_model_len=32 + args.output_tokens,
                    max_num_seqs=count,
                    kv_cache_memory="512MiB",
                    enable_prefix_caching=False,
                )
            )
            for mode in MODES
        }
        took: dict[bool, list[float]] = {mode: [] for mode in MODES}
        for engine in engines.values():
            await engine.start()
            await seconds(engine, prompts, args.output_tokens)  # warm-up
        for turn in range(args.rounds):
            for mode in MODES if turn % 2 else MODES[::-1]:
                took[mode].append(await seconds(engines[mode], prompts, args.output_tokens))
        for engine in engines.values():
            await engine.stop()
        ratios = [off / on for off, on in zip(took[False], took[True], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rates = [f"{count * args.output_tokens / statistics.median(took[mode]):.1f}" for mode in MODES]
        table.add_row(str(count), *rates, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    asyncio.run(main())
