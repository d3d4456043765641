"""Output tokens per second with and without overlapping steps, in turns.

    python -m benchmarks.engine.overlap
    python -m benchmarks.engine.overlap --requests 1 32 --rounds 9

Two engines on the same model, one with ``overlap``, answer the same prompts in turns. The table has the
median of the pairs' ratios, and the lower and the upper quartile.
"""

from __future__ import annotations

import asyncio
import statistics
from functools import partial

from aioengine import EngineConfig
from benchmarks.shared.engines import random_prompts, run_once, started
from benchmarks.shared.report import arguments, console, new_table
from benchmarks.shared.turns import in_turns, quartiles

MODES = (True, False)


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    title = f"{args.model}, {args.output_tokens} output tokens each, {args.rounds} rounds"
    columns = ("tok/s without", "tok/s with overlap", "ratio", "quartiles")
    table = new_table(title, "requests", *columns, texts=0)
    for count in args.requests:
        prompts = random_prompts(40_100, count, 32)
        configs = {
            mode: EngineConfig(
                model=args.model,
                dtype="bfloat16",
                quantization=args.quantization,
                overlap=mode,
                max_model_len=32 + args.output_tokens,
                max_num_seqs=count,
                kv_cache_memory="512MiB",
                enable_prefix_caching=False,
            )
            for mode in MODES
        }
        async with started(configs) as engines:
            work = {mode: partial(run_once, engines[mode], prompts, args.output_tokens) for mode in MODES}
            await in_turns(work, 1)  # warm-up
            runs = await in_turns(work, args.rounds)
        without, overlapped = ([run.result[0] for run in runs[mode]] for mode in (False, True))
        low, middle, high = quartiles(overlapped, without)
        rates = [f"{statistics.median(rates):.1f}" for rates in (without, overlapped)]
        table.add_row(str(count), *rates, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
