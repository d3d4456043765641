"""How a long prompt slows down another stream, by max_step_seconds.

A bystander streams 100 tokens at a time, back to back. Then one request with a prompt of 8,000 random tokens
arrives. Prints the gaps between the bystander's tokens before and during the prompt, the time to the first
token of a stream that it starts meanwhile, and the time of the prompt.

    python -m benchmarks.engine.long_prompt
    python -m benchmarks.engine.long_prompt --targets 0.1 0.2 3600 --prompt-tokens 4000

Targets take turns, so that a drift of the machine's speed falls on all of them.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time

from aioengine import AsyncEngine, EngineConfig, SamplingParams
from benchmarks.shared.report import arguments, console, new_table, percentile


class Seen:
    """Seconds, of all repeats together."""

    def __init__(self) -> None:
        self.alone: list[float] = []
        self.beside: list[float] = []
        self.first: list[float] = []
        self.prompt: list[float] = []


async def measure(engine: AsyncEngine, prompt: list[int], seen: Seen) -> None:
    gaps, ended = seen.alone, False

    async def bystander() -> None:
        while not ended:
            last, is_first = time.perf_counter(), True
            own = [random.randrange(100, 40000) for _ in range(20)]
            async for _ in engine.generate(own, SamplingParams(max_tokens=100, ignore_eos=True)):
                now = time.perf_counter()
                (seen.first if is_first and gaps is seen.beside else gaps).append(now - last)
                last, is_first = now, False

    streaming = asyncio.create_task(bystander())
    await asyncio.sleep(2)
    gaps = seen.beside
    began = time.perf_counter()
    await engine.complete(prompt, SamplingParams(max_tokens=1))
    seen.prompt.append(time.perf_counter() - began)
    ended = True
    await streaming


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt-tokens", type=int, default=8000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2, 3600.0], help="max_step_seconds")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    prompt = random.Random(0).choices(range(100, 40000), k=args.prompt_tokens)
    results = {target: Seen() for target in args.targets}
    for _ in range(args.repeats):
        for target, seen in results.items():
            config = EngineConfig(model=args.model, max_step_seconds=target, kv_cache_memory="1GiB")
            async with AsyncEngine(config) as engine:
                await measure(engine, prompt, seen)
    title = f"a stream beside a prompt of {args.prompt_tokens} tokens, milliseconds"
    columns = ("alone: median", "99%", "beside it: median", "99%", "longest", "first token", "the prompt, s")
    table = new_table(title, "max_step_seconds", *columns)
    for target, seen in results.items():
        numbers = [percentile(seen.alone, q) for q in (0.5, 0.99)]
        numbers += [percentile(seen.beside, q) for q in (0.5, 0.99, 1.0)]
        numbers.append(statistics.median(seen.first) if seen.first else float("nan"))
        row = [f"{1000 * number:.0f}" for number in numbers]
        table.add_row(f"{target:g}", *row, f"{statistics.median(seen.prompt):.1f}")
    console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
