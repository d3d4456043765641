"""Parts of the benchmark ``models``: steps run natively, and by transformers on the engine and alone.

A random model of SmolLM2-135M's shape (no download), of the base model and with 8 adapters of rank 16:
32 sequences that decode a token each after a short prompt, and prompts of 4 x 128 tokens. By transformers
alone a decode step is a part of ``generate``, of peft's mixed batches with adapters. All take turns in one
thread, so medians of processor time are comparable on a busy machine, too. The last columns are what 32
prompts of 128 tokens with 64 output tokens each come to, and how many times as long as the engine with
transformers that is.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.model_steps
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import ModelImpl
from benchmarks.engine.models import ADAPTERS, RANK, save_model
from benchmarks.shared.engines import write_adapters
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.steps import Steps

ROWS, SHORT = 32, 16
PROMPTS, PROMPT, NEW = 4, 128, 64
STEPS = 6
"""Decode steps that are timed together."""
Work = Callable[[], float]
"""Returns seconds."""


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def on_engine(steps: Steps, adapters: int) -> tuple[Work, Work]:
    """Return a decode step and a step with prompts."""
    step = steps.decode(ROWS, SHORT + STEPS // 2, adapters)

    def decode() -> float:
        step()  # the caches hold what the variant before it has used
        return sum(seconds(step) for _ in range(STEPS)) / STEPS

    return decode, partial(seconds, steps.prefill(PROMPTS, PROMPT, adapters))


def alone(mixed: Any, *, adapted: bool) -> tuple[Work, Work]:
    """Return the same by ``generate``: a decode step is a part of what more tokens take."""

    def generate(rows: int, length: int, new: int) -> float:
        ids = torch.randint(100, 49000, (rows, length), generator=torch.Generator().manual_seed(0))
        options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        if adapted:
            options["adapter_names"] = [str(i % ADAPTERS) for i in range(rows)]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        with torch.no_grad():
            if adapted:
                return seconds(lambda: mixed.generate(**inputs, **options))
            with mixed.disable_adapter():
                return seconds(lambda: mixed.generate(**inputs, **options))

    def decode() -> float:
        return (generate(ROWS, SHORT, 1 + STEPS) - generate(ROWS, SHORT, 1)) / STEPS

    return decode, lambda: generate(PROMPTS, PROMPT, 1)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work: dict[str, tuple[Work, Work]] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = save_model(Path(root) / "model", args.layers, torch.bfloat16)
        impls: tuple[ModelImpl, ...] = ("native", "transformers")
        for name in impls:
            steps = Steps(str(folder), kv_tokens=ROWS * PROMPT, slots=ADAPTERS, rank=RANK, model_impl=name)
            work[f"{name}, base"] = on_engine(steps, 0)
            work[f"{name}, {ADAPTERS} adapters"] = on_engine(steps, ADAPTERS)
        paths = list(write_adapters(Path(root), read_spec(folder), ADAPTERS, RANK).values())
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        mixed: Any = PeftModel.from_pretrained(model, str(paths[0]), adapter_name="0").eval()
        for i, path in enumerate(paths[1:], start=1):
            mixed.load_adapter(str(path), adapter_name=str(i))
        work["generate, base"] = alone(mixed, adapted=False)
        work[f"peft, {ADAPTERS} adapters"] = alone(mixed, adapted=True)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        for _ in range(args.rounds + 1):  # the first warms up
            for name, (decode, prefill) in work.items():
                runs[name].append((decode(), prefill()))
    table = new_table(
        f"{args.layers} layers, bfloat16, one thread, {cpu_name()}; ms of processor time (median)",
        *(
            "variant",
            f"decode, {ROWS} rows",
            f"{PROMPTS} x {PROMPT} prompt tokens",
            "all, s",
            "times as long",
        ),
    )
    medians = {
        name: [statistics.median(each) for each in zip(*found[1:], strict=True)]
        for name, found in runs.items()
    }
    total = {name: (NEW - 1) * decode + ROWS / PROMPTS * prompt for name, (decode, prompt) in medians.items()}
    for name, (decode_seconds, prompt_seconds) in medians.items():
        table.add_row(
            *(name, f"{1000 * decode_seconds:.1f}", f"{1000 * prompt_seconds:.0f}", f"{total[name]:.2f}"),
            f"{total[name] / total['transformers, ' + name.partition(', ')[2]]:.2f}",
        )
    console().print(table)


if __name__ == "__main__":
    main()
