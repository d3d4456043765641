"""Models that are run natively, and by transformers on the engine."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

from aioengine import AsyncEngine
from aioengine.cli.bench import random_prompts, run_once
from aioengine.model.files.resolve import read_spec
from benchmarks.runner import Calls
from benchmarks.shared.engines import OUTPUT, PROMPT, configuration, started, write_adapters
from benchmarks.shared.shapes import SMOL, random_model

ADAPTERS = 8


async def rate(engine: AsyncEngine, prompts: list[list[int]], output: int, adapters: Any = (None,)) -> float:
    """Return the output tokens of a run."""
    await run_once(engine, prompts, output, adapters)
    return float(len(prompts) * output)


async def models(
    *, requests: int = 32, layers: int = 30, output_tokens: int = OUTPUT, rounds: int = 3
) -> AsyncGenerator[Calls, None]:
    """One model run natively and by transformers on the engine, without adapters and with 8 of rank 16.

    ``peers beside_peers --peers aioengine transformers`` has transformers' own generate, and peft's mixed
    batches.
    """
    prompts = random_prompts(SMOL.vocab_size, requests, PROMPT)
    with tempfile.TemporaryDirectory() as root:
        folder = random_model(Path(root), "smol", layers)
        adapters = write_adapters(Path(root), read_spec(folder), ADAPTERS)
        configs = {
            impl: configuration(
                str(folder), slots=ADAPTERS, model_impl=impl, max_num_seqs=requests,
                max_model_len=PROMPT + output_tokens,
            )
            for impl in ("native", "transformers")
        }  # fmt: skip
        async with started(configs, adapters) as engines:
            calls = {
                f"{impl}, {what}": partial(rate, engine, prompts, output_tokens, names)
                for impl, engine in engines.items()
                for what, names in (("base", [None]), (f"{ADAPTERS} adapters", list(adapters)))
            }
            title = f"{requests} requests of {PROMPT} + {output_tokens} tokens, {layers} layers"
            yield Calls(title, calls, rounds, unit="s")


CASES = (models,)
