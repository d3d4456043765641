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

import asyncio
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from aioengine import EngineConfig, LoRAConfig
from aioengine.checks import format_bytes
from aioengine.memory_plan import plan_from_config
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.shared.engines import random_prompts, run_once, started, write_adapters
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.turns import in_turns


async def main() -> None:
    parser = arguments(__doc__)
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

    def config(rank: int, slot_memory: int | None = None) -> EngineConfig:
        return EngineConfig(
            model=args.model,
            dtype=args.dtype,
            max_model_len=args.prompt_tokens + args.output_tokens,
            max_num_seqs=args.requests,
            kv_cache_memory="256MiB",
            enable_prefix_caching=False,  # every run computes every prompt
            lora=LoRAConfig(max_loras=args.adapters, max_lora_rank=rank, slot_memory=slot_memory),
        )

    own = f"slots of rank {args.rank}"
    configs = {
        own: config(args.rank),
        f"slots of rank {args.largest}": config(args.largest),
        f"by bytes, rank {args.largest} at most": config(
            args.largest, plan_from_config(config(args.rank)).slot_pool_bytes
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(Path(folder), spec, args.adapters, args.rank)
        async with started(configs, adapters) as engines:
            memory = {name: engine.stats().slot_memory for name, engine in engines.items()}
            work = {
                name: partial(run_once, engine, prompts, args.output_tokens, list(adapters))
                for name, engine in engines.items()
            }
            await in_turns(work, 1)  # warm-up
            runs = await in_turns(work, args.repeats)
    table = new_table(
        f"{args.adapters} adapters of rank {args.rank}, {args.requests} requests x "
        f"{args.prompt_tokens} + {args.output_tokens} tokens, {args.model} {args.dtype}, "
        f"{torch.get_num_threads()} threads, {cpu_name()}",
        *("slots", "memory", "processor time", "of their own rank"),
    )
    for name, found in runs.items():
        ratios = sorted(run.processor / first.processor for run, first in zip(found, runs[own], strict=True))
        table.add_row(
            name,
            format_bytes(memory[name]),
            f"{statistics.median(run.processor for run in found):.2f} s",
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})",
        )
    console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
