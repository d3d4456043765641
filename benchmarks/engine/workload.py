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

import argparse
import asyncio
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model


async def run_once(
    engine: AsyncEngine, prompts: list[list[int]], output_tokens: int, adapters: list[str | None]
) -> tuple[float, float]:
    """Return (output tokens per second, median TTFT in seconds) of all prompts at once."""
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = await asyncio.gather(
        *(
            engine.complete(prompt, params, adapter=adapters[i % len(adapters)])
            for i, prompt in enumerate(prompts)
        )
    )
    seconds = time.perf_counter() - start
    assert all(len(out.token_ids) == output_tokens for out in outputs)
    ttft = statistics.median(out.ttft or 0.0 for out in outputs)
    return len(prompts) * output_tokens / seconds, ttft


def random_prompts(vocabulary: int, requests: int, tokens: int) -> list[list[int]]:
    """Draw prompts of random token ids; they are the same in each run."""
    rng = random.Random(0)
    return [[rng.randrange(100, vocabulary - 100) for _ in range(tokens)] for _ in range(requests)]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
    names: list[str | None] = [f"random-{i}" for i in range(max(args.adapters))]
    variants: dict[str, list[str | None]] = {"base": [None]}
    variants |= {f"{count} adapters, rank {args.rank}": names[:count] for count in args.adapters}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncEngine(config) as engine:
            for i, name in enumerate(names):
                path = write_random_adapter(Path(folder) / str(i), spec, args.rank, seed=i)
                await engine.load_adapter(str(name), path)
            for adapters in variants.values():  # warm-up
                await run_once(engine, prompts, 2, adapters)
            for _ in range(args.repeats):
                for name, adapters in variants.items():
                    results[name].append(await run_once(engine, prompts, args.output_tokens, adapters))

    table = Table(
        title=f"{args.requests} requests x {args.prompt_tokens} + {args.output_tokens} tokens, "
        f"{args.model} {args.dtype}, quantization {args.quantization}, "
        f"{torch.get_num_threads()} threads, {cpu_name()}"
    )
    for column in ("variant", "output tok/s (median)", "min .. max", "median TTFT", "of base"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    base = statistics.median(rate for rate, _ in results["base"])
    for name, runs in results.items():
        rates = sorted(rate for rate, _ in runs)
        median = statistics.median(rates)
        ttft = statistics.median(ttft for _, ttft in runs)
        table.add_row(
            name,
            f"{median:.1f}",
            f"{rates[0]:.1f} .. {rates[-1]:.1f}",
            f"{ttft:.2f} s",
            f"{median / base:.0%}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def cpu_name() -> str:
    """Return the processor's name in the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    asyncio.run(main())
