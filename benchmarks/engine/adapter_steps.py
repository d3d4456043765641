"""Where the time of a run with adapters goes: steps with prompts and decode steps, and their phases.

The work is that of ``aioengine bench``. Requests' prompts are cut and computed together with the decodes of
requests that have begun; when all have, steps have decodes only. The same work without adapters takes turns
with it; prints the runs whose time is the median.

    python -m benchmarks.engine.adapter_steps --adapters 32
    python -m benchmarks.engine.adapter_steps --adapters 32 --lora-dtype int8
    python -m benchmarks.engine.adapter_steps --adapters 8 --rank 64
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.kernels.cpu.structs import PHASES
from aioengine.model import runner
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.spec import LORA_MODULES, ModelSpec
from aioengine.step import StepBatch
from benchmarks.shared.engines import random_prompts, run_once, write_adapters
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.turns import in_turns

LINEARS = ("qkv", "o", "gate_up", "down")
PROMPT, OUTPUT = 128, 64
NONE = torch.zeros(len(PHASES), dtype=torch.float64)


class Step(NamedTuple):
    """A step: how much it computed, its seconds, and those of its phases."""

    prompt_tokens: int
    decodes: int
    seconds: float
    phases: Tensor


def record(steps: list[Step]) -> None:
    """Append the steps of all engines in this process to ``steps``, from now on."""
    execute: Any = runner.ModelRunner.execute

    def recorded(model: Any, batch: StepBatch) -> Any:
        model.native.seconds = phases = NONE.clone()
        began = time.perf_counter()
        try:
            return execute(model, batch)
        finally:
            tokens = [len(work.tokens) for work in batch.sequences]
            prompts, decodes = sum(count for count in tokens if count > 1), tokens.count(1)
            steps.append(Step(prompts, decodes, time.perf_counter() - began, phases))

    runner.ModelRunner.execute = recorded  # type: ignore[method-assign]


class Run(NamedTuple):
    """Output tokens per second of a run, and its steps."""

    rate: float
    steps: list[Step]


async def main(args: argparse.Namespace) -> None:
    config = EngineConfig(
        model=args.model,
        dtype="bfloat16",
        max_model_len=PROMPT + OUTPUT,
        max_num_seqs=args.requests,
        enable_prefix_caching=False,  # every run computes every prompt
        lora=LoRAConfig(max_loras=args.adapters, max_lora_rank=args.rank, lora_dtype=args.lora_dtype),
    )
    spec = read_spec(resolve_model(args.model))
    prompts = random_prompts(spec.vocab_size, args.requests, PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncEngine(config) as engine:
            adapters = write_adapters(Path(folder), spec, args.adapters, args.rank)
            for name, path in adapters.items():
                await engine.load_adapter(name, path)
            steps: list[Step] = []
            record(steps)

            async def run(names: list[str | None], output: int = OUTPUT) -> Run:
                steps.clear()
                rate, _ = await run_once(engine, prompts, output, names)
                return Run(rate, [*steps])

            cases = {"base": lambda: run([None]), "adapters": lambda: run([*adapters])}
            for case in (run([None], 2), run([*adapters], 2)):  # warm-up
                await case
            found = await in_turns(cases, args.repeats)
    work = f"{args.requests} x {PROMPT} + {OUTPUT} tokens, {args.adapters} adapters of rank {args.rank}"
    title = f"{work} ({args.lora_dtype}), {cpu_name()}: milliseconds"
    table = new_table(title, "", "tok/s", "steps", *_COLUMNS, texts=3)
    for name, runs in found.items():
        _, median = sorted((run.seconds, i) for i, run in enumerate(runs))[len(runs) // 2]
        add_rows(table, name, runs[median].result)
    console().print(table)
    print(f"adapters add {added_products(spec, args.rank):.1%} to the products of the linears")


_COLUMNS = ("number", "prompt tokens", "decodes", "all", "linears, B", "A", "other phases", "around")


def add_rows(table: Table, name: str, run: Run) -> None:
    """Add a row for steps with prompts, and one for the others."""
    for with_prompts in (True, False):
        steps = [step for step in run.steps if (step.prompt_tokens > 0) == with_prompts]
        phases = dict(zip(PHASES, sum((step.phases for step in steps), NONE).tolist(), strict=True))
        linears, a = sum(phases[phase] for phase in LINEARS), phases["shrink"]
        seconds, model = sum(step.seconds for step in steps), sum(phases.values())
        counts = len(steps), sum(step.prompt_tokens for step in steps), sum(step.decodes for step in steps)
        times = seconds, linears, a, model - linears - a, seconds - model
        labels = (name, f"{run.rate:.0f}", "with prompts") if with_prompts else ("", "", "decodes")
        table.add_row(*labels, *map(str, counts), *(f"{of * 1e3:.0f}" for of in times))


def added_products(spec: ModelSpec, rank: int) -> float:
    """Return how many products an adapter on all linears adds, of those of the linears."""
    sizes = [spec.linear(module) for module in LORA_MODULES]
    return rank * sum(n + k for n, k in sizes) / sum(n * k for n, k in sizes)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora-dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    asyncio.run(main(parser.parse_args()))
