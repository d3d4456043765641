"""Cost of slots that could hold larger adapters: small adapters in slots of their size, in slots of the
largest size, and in a memory where each takes its own size.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.slot_sizes
    OMP_NUM_THREADS=1 python -m benchmarks.engine.slot_sizes --rank 8 --largest 64 --requests 8 --repeats 9

There is one engine for each, all in this process, and they take turns. Prints the processor time of a run (of
all threads, so use one thread: others spin while they wait), and the median over the rounds of its ratio to
slots of the adapters' own rank in the same round. So the effect of other programs, which all of a round
share, cancels.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.memory_plan import format_bytes
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.engine.workload import cpu_name, random_prompts, run_once


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--largest", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    spec = read_spec(resolve_model(args.model))
    prompts = random_prompts(spec.vocab_size, args.requests, args.prompt_tokens)
    names: list[str | None] = [f"random-{i}" for i in range(args.adapters)]

    def engine(rank: int, slot_memory: int | None = None) -> AsyncEngine:
        config = EngineConfig(
            model=args.model,
            dtype=args.dtype,
            max_model_len=args.prompt_tokens + args.output_tokens,
            max_num_seqs=args.requests,
            kv_cache_memory="256MiB",
            enable_prefix_caching=False,  # every run computes every prompt
            lora=LoRAConfig(max_loras=args.adapters, max_lora_rank=rank, slot_memory=slot_memory),
        )
        return AsyncEngine(config)

    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = [write_random_adapter(folder / str(i), spec, args.rank, seed=i) for i in range(args.adapters)]
        engines: dict[str, AsyncEngine] = {}

        async def start(name: str, made: AsyncEngine) -> None:
            engines[name] = await stack.enter_async_context(made)
            for adapter, path in zip(names, paths, strict=True):
                await made.load_adapter(str(adapter), path)
            await run_once(made, prompts, 4, names)
            memory[name] = made.stats().slot_memory
            seconds[name] = []

        own = f"slots of rank {args.rank}"
        await start(own, engine(args.rank))
        await start(f"slots of rank {args.largest}", engine(args.largest))
        await start(f"by bytes, rank {args.largest} at most", engine(args.largest, memory[own]))
        for index in range(args.repeats):
            turn = list(engines) if index % 2 else list(reversed(engines))
            for name in turn:
                before = time.process_time()
                await run_once(engines[name], prompts, args.output_tokens, names)
                seconds[name].append(time.process_time() - before)

    table = Table(
        title=f"{args.adapters} adapters of rank {args.rank}, {args.requests} requests x "
        f"{args.prompt_tokens} + {args.output_tokens} tokens, {args.model} {args.dtype}, "
        f"{torch.get_num_threads()} threads, {cpu_name()}"
    )
    for column in ("slots", "memory", "processor time", "of their own rank"):
        table.add_column(column, justify="left" if column == "slots" else "right")
    for name, runs in seconds.items():
        ratios = sorted(run / first for run, first in zip(runs, seconds[own], strict=True))
        table.add_row(
            name,
            format_bytes(memory[name]),
            f"{statistics.median(runs):.2f} s",
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})",
        )
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    asyncio.run(main())
