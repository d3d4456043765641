"""``aioengine bench``: how many tokens a second an engine generates, with and without adapters."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from aioengine.cli.flags import Count, EngineFlags
from aioengine.cli.loop import run
from aioengine.cli.tables import print_table
from aioengine.config import ALLOWED_RANKS, EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.request import SamplingParams

Measured = tuple[float, float]
"""Output tokens per second, and the median time to a first token, in seconds."""


def bench(
    *,
    requests: Count = 32,
    prompt_tokens: Count = 128,
    output_tokens: Count = 64,
    adapters: Annotated[list[Count] | None, Parameter(consume_multiple=1)] = None,
    rank: Annotated[int, Parameter(validator=Number(gte=1, lte=max(ALLOWED_RANKS)))] = 16,
    repeats: Count = 3,
    engine: EngineFlags = EngineFlags(),
) -> int:
    """Measure output tokens per second, with and without adapters.

    All requests arrive at once, with random prompts, and their output is greedy. Request i uses adapter i %
    N of N random ones on all linears. The variants take turns, so that a drift of the machine's speed falls
    on all of them.

    Args:
        requests: Requests at once.
        prompt_tokens: Tokens of each prompt.
        output_tokens: Tokens that each request generates.
        adapters: Numbers of adapters, a variant for each (8).
        rank: Rank of the adapters.
        repeats: Measurements of each variant; the median is printed.
    """
    counts = adapters or [8]
    config = _config(engine, requests, prompt_tokens + output_tokens, max(counts), rank)
    names = [f"random-{i}" for i in range(max(counts))]
    variants: dict[str, Sequence[str | None]] = {"base": [None]}
    variants |= {f"{count} adapters, rank {rank}": names[:count] for count in counts}

    async def measure() -> dict[str, list[Measured]]:
        from aioengine.lab.calibration.random_adapters import write_random_adapter
        from aioengine.model.files.resolve import read_spec, resolve_model

        spec = read_spec(resolve_model(config.model), config.model_impl)
        prompts = random_prompts(spec.vocab_size, requests, prompt_tokens)
        results: dict[str, list[Measured]] = {name: [] for name in variants}
        with tempfile.TemporaryDirectory() as folder:
            async with AsyncEngine(config) as running:
                for i, name in enumerate(names):
                    path = write_random_adapter(Path(folder) / name, spec, rank, seed=i)
                    await running.load_adapter(name, path)
                for of in variants.values():  # warm-up
                    await run_once(running, prompts, 2, of)
                for _ in range(repeats):
                    for variant, of in variants.items():
                        results[variant].append(await run_once(running, prompts, output_tokens, of))
        return results

    _print(run(measure()), f"{requests} requests x {prompt_tokens} + {output_tokens} tokens", config)
    return 0


def _config(flags: EngineFlags, requests: int, tokens: int, adapters: int, rank: int) -> EngineConfig:
    """Return the configuration that the file and the flags set. What they leave open has room for all that
    is measured."""
    values, source = flags.settings()
    given = EngineConfig.from_dict(values, source=source)
    lora = values.get("lora", {})
    lora = {
        "max_loras": min(adapters, lora.get("max_cpu_loras", adapters)),
        "max_cpu_loras": max(adapters, lora.get("max_loras", adapters)),
        "max_lora_rank": min(size for size in ALLOWED_RANKS if size >= rank),
        **lora,
    }
    values = {"max_model_len": tokens, "max_num_seqs": requests, **values, "lora": lora}
    values["max_num_batched_tokens"] = max(given.max_num_batched_tokens, values["max_num_seqs"])
    values["enable_prefix_caching"] = False  # every run computes every prompt
    return EngineConfig.from_dict(values, source=source)


async def run_once(
    engine: AsyncEngine,
    prompts: Sequence[list[int]],
    output_tokens: int,
    adapters: Sequence[str | None] = (None,),
) -> Measured:
    """Run all prompts at once; request i uses adapter i % n of n."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    outputs = await asyncio.gather(
        *(
            engine.complete(prompt, params, adapter=adapters[i % len(adapters)])
            for i, prompt in enumerate(prompts)
        )
    )
    seconds = time.perf_counter() - start
    return sum(len(out.token_ids) for out in outputs) / seconds, median(out.ttft or 0.0 for out in outputs)


def random_prompts(
    vocabulary: int, requests: int, tokens: int, rng: random.Random | None = None
) -> list[list[int]]:
    """Draw prompts of random token ids; they are the same in each run."""
    rng = random.Random(0) if rng is None else rng
    ids = range(min(100, vocabulary // 2), max(vocabulary - 100, vocabulary // 2 + 1))
    return [[rng.choice(ids) for _ in range(tokens)] for _ in range(requests)]


def _print(results: dict[str, list[Measured]], work: str, config: EngineConfig) -> None:
    from aioengine.lab.runs.provenance import machine

    title = f"{work}, {config.model_name}, {config.dtype}, quantization {config.quantization}; {machine()}"
    columns = ("variant", ">output tok/s (median)", ">min .. max", ">median TTFT", ">of base")
    rows, base = [], 0.0
    for name, runs in results.items():
        rates, ttfts = zip(*runs, strict=True)
        rate, spread = median(rates), f"{min(rates):.1f} .. {max(rates):.1f}"
        base = base or rate
        rows.append((name, f"{rate:.1f}", spread, f"{median(ttfts):.2f} s", f"{rate / base:.0%}"))
    print_table(columns, rows, title)
