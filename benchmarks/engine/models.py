"""Models that are run natively, by transformers on the engine, and by transformers alone."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from aioengine import AsyncEngine
from aioengine.model.files.resolve import read_spec
from benchmarks.runner import Calls
from benchmarks.shared.engines import (
    OUTPUT,
    PROMPT,
    configuration,
    random_prompts,
    run_once,
    started,
    write_adapters,
)
from benchmarks.shared.shapes import SMOL, random_model

ADAPTERS, RANK = 8, 16


async def rate(engine: AsyncEngine, prompts: list[list[int]], output: int, adapters: Any = (None,)) -> float:
    """Return the output tokens of a run."""
    await run_once(engine, prompts, output, adapters)
    return float(len(prompts) * output)


async def models(
    *, requests: int = 32, layers: int = 30, output_tokens: int = OUTPUT, rounds: int = 3, alone: bool = True,
) -> AsyncGenerator[Calls, None]:  # fmt: skip
    """One model run natively, by transformers on the engine, and by transformers' generate alone.

    32 requests at once of the base model and with 8 adapters of rank 16. Alone, the same static batch, and
    peft's mixed batches with adapters.
    """
    prompts = random_prompts(SMOL.vocab_size, requests, PROMPT)
    with tempfile.TemporaryDirectory() as root:
        folder = random_model(Path(root), "smol", layers)
        adapters = write_adapters(Path(root), read_spec(folder), ADAPTERS, RANK)
        configs = {
            impl: configuration(
                str(folder), slots=ADAPTERS, model_impl=impl, max_num_seqs=requests,
                max_model_len=PROMPT + output_tokens,
            )
            for impl in ("native", "transformers")
        }  # fmt: skip
        async with started(configs, adapters) as engines:
            calls: dict[str, Any] = {}
            for impl, engine in engines.items():
                calls[f"{impl}, base"] = partial(rate, engine, prompts, output_tokens)
                calls[f"{impl}, {ADAPTERS} adapters"] = partial(
                    rate, engine, prompts, output_tokens, list(adapters)
                )
            if alone:
                calls |= by_generate(folder, list(adapters.values()), prompts, output_tokens)
            title = f"{requests} requests of {PROMPT} + {output_tokens} tokens, {layers} layers"
            yield Calls(title, calls, rounds, unit="s")


def by_generate(
    folder: Path, adapters: list[Path], prompts: list[list[int]], new: int
) -> dict[str, Callable[[], float]]:
    """Return calls of transformers' ``generate``, and of peft's mixed batches."""
    auto: Any = transformers.AutoModelForCausalLM
    model, beneath = (auto.from_pretrained(folder, dtype=torch.bfloat16).eval() for _ in range(2))
    mixed: Any = PeftModel.from_pretrained(beneath, str(adapters[0]), adapter_name="0").eval()
    for i, path in enumerate(adapters[1:], start=1):
        mixed.load_adapter(str(path), adapter_name=str(i))
    ids = torch.tensor(prompts)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def generate(model: Any, **more: Any) -> float:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)
        return float(out.numel() - ids.numel())

    names = [str(i % len(adapters)) for i in range(len(prompts))]
    return {
        "generate, base": lambda: generate(model),
        f"peft, {len(adapters)} adapters": lambda: generate(mixed, adapter_names=names),
    }


CASES = (models,)
