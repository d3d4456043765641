"""Speed of one model run natively, by transformers on the engine, and by transformers alone.

A random model of SmolLM2-135M's shape (no download): 32 requests at once, 128 prompt tokens and 64 output
tokens each, of the base model and with 8 adapters of rank 16; the same batch by transformers' ``generate``,
which pads nothing here because all prompts have one length, and by peft with an adapter for each row.

    python -m benchmarks.engine.models
    python -m benchmarks.engine.models --requests 8 --repeats 1 --without-alone
    python -m benchmarks.engine.models --layers 8 --dtype float32

The variants take turns, so that a drift of the machine's speed falls on all; medians are printed. Processor
seconds are those of all threads, and do not change much on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from aioengine import EngineConfig, LoRAConfig
from aioengine.model.files.resolve import read_spec
from benchmarks.shared.engines import random_prompts, run_once, started, write_adapters
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.turns import Run, in_turns

ADAPTERS, RANK = 8, 16
Work = Callable[[], Awaitable[tuple[float, float]]]
"""Returns output tokens per second, and the time to the first token (0 where it is not known)."""


def save_model(folder: Path, layers: int, dtype: torch.dtype) -> Path:
    """Write a random llama of SmolLM2-135M's shape."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def alone(
    folder: Path, adapters: list[Path], dtype: torch.dtype, prompts: list[list[int]], new: int
) -> dict[str, Work]:
    """Time transformers' ``generate`` and peft's mixed batches."""
    model, beneath = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for _ in range(2)
    )
    ids = torch.tensor(prompts)
    mixed: Any = PeftModel.from_pretrained(beneath, str(adapters[0]), adapter_name="0").eval()
    for i, path in enumerate(adapters[1:], start=1):
        mixed.load_adapter(str(path), adapter_name=str(i))
    names = [str(i % len(adapters)) for i in range(len(prompts))]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    async def generate(model: Any, **more: Any) -> tuple[float, float]:
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)
        assert out.shape[1] == ids.shape[1] + new
        return len(prompts) * new / (time.perf_counter() - began), 0.0

    return {
        "generate, base": lambda: generate(model),
        "peft, mixed": lambda: generate(mixed, adapter_names=names),
    }


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-alone", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    prompts = random_prompts(49152, args.requests, 128)
    with tempfile.TemporaryDirectory() as root:
        folder = save_model(Path(root) / "model", args.layers, dtype)
        adapters = write_adapters(Path(root), read_spec(folder), ADAPTERS, RANK)
        configs = {
            impl: EngineConfig(
                model=str(folder),
                model_impl=impl,
                dtype=args.dtype,
                device="cpu",
                max_model_len=128 + args.output_tokens,
                max_num_seqs=args.requests,
                kv_cache_memory="512MiB",
                enable_prefix_caching=False,  # every run computes every prompt
                lora=LoRAConfig(max_loras=ADAPTERS, max_lora_rank=RANK),
            )
            for impl in ("native", "transformers")
        }
        async with started(configs, adapters) as engines:
            work: dict[str, Work] = {}
            for impl, engine in engines.items():
                work[f"{impl}, base"] = partial(run_once, engine, prompts, args.output_tokens)
                work[f"{impl}, {ADAPTERS} adapters"] = partial(
                    run_once, engine, prompts, args.output_tokens, list(adapters)
                )
            if not args.without_alone:
                work |= alone(folder, list(adapters.values()), dtype, prompts, args.output_tokens)
            _print(await in_turns(work, args.repeats), args)


def _print(runs: dict[str, list[Run[tuple[float, float]]]], args: argparse.Namespace) -> None:
    title = (
        f"{args.requests} requests x 128 + {args.output_tokens} tokens, {args.layers} layers, {args.dtype}, "
        f"{torch.get_num_threads()} threads, {cpu_name()}"
    )
    columns = ("variant", "output tok/s (median)", "min .. max", "of native, base")
    table = new_table(title, *columns, "processor s (median)", "native, base, of it")
    results = {name: [run.result[0] for run in found] for name, found in runs.items()}
    processor = {name: statistics.median(run.processor for run in found) for name, found in runs.items()}
    base, cpu_base = statistics.median(results["native, base"]), processor["native, base"]
    for name, rates in results.items():
        median, cpu = statistics.median(rates), processor[name]
        table.add_row(
            *(name, f"{median:.1f}", f"{min(rates):.1f} .. {max(rates):.1f}", f"{median / base:.0%}"),
            *(f"{cpu:.1f}", f"{cpu_base / cpu:.0%}"),
        )
    console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
