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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from aioengine import EngineConfig, LoRAConfig
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec
from benchmarks.shared.engines import run_once, started
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.turns import Run, in_turns

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
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--adapters", type=int, default=0, choices=(0, 1))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    prompt = [random.Random(0).randrange(100, 49000) for _ in range(PROMPT)]
    with tempfile.TemporaryDirectory() as root:
        configs = {}
        for family, sizes in FAMILIES.items():
            folder = Path(root) / family
            config = transformers.AutoConfig.for_model(
                family, **{**SIZES, **sizes, "num_hidden_layers": args.layers}
            )
            auto: Any = transformers.AutoModelForCausalLM
            auto.from_config(config).to(getattr(torch, args.dtype)).save_pretrained(folder)
            configs[family] = EngineConfig(
                model=str(folder),
                model_impl="native",
                dtype=args.dtype,
                device="cpu",
                max_model_len=PROMPT + args.output_tokens,
                kv_cache_memory="64MiB",
                lora=LoRAConfig(max_loras=1, max_lora_rank=RANK) if args.adapters else None,
            )
        async with started(configs) as engines:
            if args.adapters:
                for family, engine in engines.items():
                    spec = read_spec(Path(root) / family)
                    path = write_random_adapter(Path(root) / f"{family}-a", spec, RANK, seed=0)
                    await engine.load_adapter("a", path)
            adapters = ["a" if args.adapters else None]
            work = {
                family: partial(run_once, engine, [prompt], args.output_tokens, adapters)
                for family, engine in engines.items()
            }
            _print(await in_turns(work, args.repeats), args)


def _print(runs: dict[str, list[Run[tuple[float, float]]]], args: argparse.Namespace) -> None:
    title = f"1 request x {PROMPT} + {args.output_tokens} tokens, {args.layers} layers, {args.dtype}, "
    title += f"{args.adapters} adapters, {torch.get_num_threads()} threads, {cpu_name()}"
    columns = ("ms a step (median)", "of llama", "processor ms a step (median)", "of llama")
    table = new_table(title, "family", *columns)
    for family, found in runs.items():
        cells = []
        for values in ("seconds", "processor"):
            own, base = ([getattr(run, values) for run in of] for of in (found, runs["llama"]))
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            each = statistics.median(own) / args.output_tokens
            cells += [f"{1000 * each:.2f}", f"{statistics.median(ratios):.2f}"]
        table.add_row(family, *cells)
    console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
