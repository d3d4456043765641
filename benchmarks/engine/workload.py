"""Throughput of the whole engine on one workload, with and without adapters.

32 requests at once, 128 random prompt tokens each, 64 greedy output tokens, end of sequence ignored;
with adapters, request i uses adapter i % 8 of 8 random rank-16 adapters on all seven linears, as many slots.

    python -m benchmarks.engine.workload
    python -m benchmarks.engine.workload --adapters 8 32
    python -m benchmarks.engine.workload --requests 8 --adapters 4 --rank 32 --repeats 5
    python -m benchmarks.engine.workload --quantization int8

The variants take turns, so that a drift of the machine's speed falls on both; medians are printed.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from aioengine import EngineConfig, LoRAConfig
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.shared.engines import random_prompts, run_once, started, write_adapters
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.turns import in_turns


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8], help="how many, a variant for each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    spec = read_spec(resolve_model(args.model))
    prompts = random_prompts(spec.vocab_size, args.requests, args.prompt_tokens)
    config = EngineConfig(
        model=args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=args.prompt_tokens + args.output_tokens,
        max_num_seqs=args.requests,
        max_num_batched_tokens=max(2048, args.requests),
        kv_cache_memory="1GiB",
        enable_prefix_caching=False,  # every run computes every prompt
        lora=LoRAConfig(max_loras=max(args.adapters), max_lora_rank=args.rank),
    )
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(Path(folder), spec, max(args.adapters), args.rank)
        variants: dict[str, list[str | None]] = {"base": [None]}
        variants |= {f"{n} adapters, rank {args.rank}": list(adapters)[:n] for n in args.adapters}
        async with started({"": config}, adapters) as engines:
            for names in variants.values():  # warm-up
                await run_once(engines[""], prompts, 2, names)
            work = {
                variant: partial(run_once, engines[""], prompts, args.output_tokens, names)
                for variant, names in variants.items()
            }
            runs = await in_turns(work, args.repeats)
    results = {name: [run.result for run in found] for name, found in runs.items()}

    table = new_table(
        f"{args.requests} requests x {args.prompt_tokens} + {args.output_tokens} tokens, "
        f"{args.model} {args.dtype}, quantization {args.quantization}, "
        f"{torch.get_num_threads()} threads, {cpu_name()}",
        *("variant", "output tok/s (median)", "min .. max", "median TTFT", "of base"),
    )
    base = statistics.median(rate for rate, _ in results["base"])
    for name, found in results.items():
        rates = sorted(rate for rate, _ in found)
        median = statistics.median(rates)
        ttft = statistics.median(ttft for _, ttft in found)
        table.add_row(
            name,
            f"{median:.1f}",
            f"{rates[0]:.1f} .. {rates[-1]:.1f}",
            f"{ttft:.2f} s",
            f"{median / base:.0%}",
        )
    console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
