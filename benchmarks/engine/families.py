"""Steps of native model families that read as many bytes of weights as Llama's.

Random models with matrices of SmolLM2-135M's sizes (no download): Llama, Gemma 3 and Phi-3, which differ in
norms, windows and activation; and a mixture of 16 experts. There each token uses 4 experts, each as large as
a quarter of Llama's MLP, so that the steps of one sequence read as many bytes as Llama's. One request
decodes, so that almost all time is in steps of one token.

    python -m benchmarks.engine.families
    python -m benchmarks.engine.families --adapters 1 --layers 8

The models take turns, so that a drift of the machine's speed falls on all. Processor seconds are those of
all threads, and do not change much on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec
from benchmarks.engine.workload import cpu_name

PROMPT, RANK = 8, 16
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 1536},
    "gemma3_text": {"intermediate_size": 1536, "sliding_window": 512},
    "phi3": {"intermediate_size": 1536},
    "mixtral": {"intermediate_size": 384, "num_local_experts": 16, "num_experts_per_tok": 4},
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--adapters", type=int, default=0, choices=(0, 1))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    prompt = [random.Random(0).randrange(100, 49000) for _ in range(PROMPT)]
    params = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
    adapter = "a" if args.adapters else None
    with tempfile.TemporaryDirectory() as root:
        engines: dict[str, AsyncEngine] = {}
        for family, sizes in FAMILIES.items():
            folder = Path(root) / family
            config = transformers.AutoConfig.for_model(
                family, **{**SIZES, **sizes, "num_hidden_layers": args.layers}
            )
            auto: Any = transformers.AutoModelForCausalLM
            auto.from_config(config).to(getattr(torch, args.dtype)).save_pretrained(folder)
            engine = engines[family] = AsyncEngine(
                EngineConfig(
                    model=str(folder),
                    model_impl="native",
                    dtype=args.dtype,
                    device="cpu",
                    max_model_len=PROMPT + args.output_tokens,
                    kv_cache_memory="64MiB",
                    lora=LoRAConfig(max_loras=1, max_lora_rank=RANK) if adapter else None,
                )
            )
            await engine.start()
            if adapter:
                path = write_random_adapter(Path(root) / f"{family}-a", read_spec(folder), RANK, seed=0)
                await engine.load_adapter(adapter, path)
        walls: dict[str, list[float]] = {family: [] for family in FAMILIES}
        cpus: dict[str, list[float]] = {family: [] for family in FAMILIES}
        for _ in range(args.repeats):
            for family, engine in engines.items():
                wall, cpu = time.perf_counter(), time.process_time()
                await engine.complete(prompt, params, adapter=adapter)
                walls[family].append(time.perf_counter() - wall)
                cpus[family].append(time.process_time() - cpu)
        for engine in engines.values():
            await engine.stop()
    _print(walls, cpus, args)


def _print(walls: dict[str, list[float]], cpus: dict[str, list[float]], args: argparse.Namespace) -> None:
    title = f"1 request x {PROMPT} + {args.output_tokens} tokens, {args.layers} layers, {args.dtype}, "
    title += f"{args.adapters} adapters, {torch.get_num_threads()} threads, {cpu_name()}"
    table = Table(title=title)
    for column in ("family", "ms a step (median)", "of llama", "processor ms a step (median)", "of llama"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family in walls:
        cells = []
        for seconds in (walls, cpus):
            ratios = [a / b for a, b in zip(seconds[family], seconds["llama"], strict=True)]
            each = statistics.median(seconds[family]) / args.output_tokens
            cells += [f"{1000 * each:.2f}", f"{statistics.median(ratios):.2f}"]
        table.add_row(family, *cells)
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    asyncio.run(main())
