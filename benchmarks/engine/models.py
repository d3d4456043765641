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
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec
from benchmarks.engine.workload import cpu_name, random_prompts, run_once

ADAPTERS, RANK = 8, 16
Run = Callable[[], Awaitable[float]]


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
) -> dict[str, Run]:
    """Time transformers' ``generate`` and peft's mixed batches."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.tensor(prompts)
    mixed: Any = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="0").eval()
    for i, path in enumerate(adapters[1:], start=1):
        mixed.load_adapter(str(path), adapter_name=str(i))
    names = [str(i % len(adapters)) for i in range(len(prompts))]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    async def generate(**more: Any) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            out = mixed.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)
        assert out.shape[1] == ids.shape[1] + new
        return len(prompts) * new / (time.perf_counter() - began)

    async def base() -> float:
        with mixed.disable_adapter():
            return await generate()

    return {"generate, base": base, "peft, mixed": lambda: generate(adapter_names=names)}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
        spec = read_spec(folder)
        paths = [write_random_adapter(Path(root) / str(i), spec, RANK, seed=i) for i in range(ADAPTERS)]
        engines: dict[str, AsyncEngine] = {}
        results: dict[str, list[float]] = {}
        runs: dict[str, Run] = {}
        for impl in ("native", "transformers"):
            config = EngineConfig(
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
            engine = engines[impl] = AsyncEngine(config)
            await engine.start()
            names: list[str | None] = [str(i) for i in range(ADAPTERS)]
            for name, path in zip(names, paths, strict=True):
                await engine.load_adapter(str(name), path)

            def runner(engine: AsyncEngine, adapters: list[str | None]) -> Run:
                async def run() -> float:
                    return (await run_once(engine, prompts, args.output_tokens, adapters))[0]

                return run

            runs[f"{impl}, base"] = runner(engine, [None])
            runs[f"{impl}, {ADAPTERS} adapters"] = runner(engine, names)
        if not args.without_alone:
            runs |= alone(folder, paths, dtype, prompts, args.output_tokens)
        processor: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            for name, run in runs.items():
                began = time.process_time()
                results.setdefault(name, []).append(await run())
                processor.setdefault(name, []).append(time.process_time() - began)
        for engine in engines.values():
            await engine.stop()
    _print(results, processor, args)


def _print(
    results: dict[str, list[float]], processor: dict[str, list[float]], args: argparse.Namespace
) -> None:
    title = (
        f"{args.requests} requests x 128 + {args.output_tokens} tokens, {args.layers} layers, {args.dtype}, "
    )
    table = Table(title=title + f"{torch.get_num_threads()} threads, {cpu_name()}")
    columns = ("variant", "output tok/s (median)", "min .. max", "of native, base")
    for column in (*columns, "processor s (median)", "native, base, of it"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    base, cpu_base = (statistics.median(each["native, base"]) for each in (results, processor))
    for name, rates in results.items():
        median, cpu = statistics.median(rates), statistics.median(processor[name])
        table.add_row(
            *(name, f"{median:.1f}", f"{min(rates):.1f} .. {max(rates):.1f}", f"{median / base:.0%}"),
            *(f"{cpu:.1f}", f"{cpu_base / cpu:.0%}"),
        )
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    asyncio.run(main())
