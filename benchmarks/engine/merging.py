"""Output tokens per second of one adapter that is alone, with its merged weights and beside the base model's.

    python -m benchmarks.engine.merging
    python -m benchmarks.engine.merging --requests 1 32 --ranks 16 64 --rounds 9

Two engines on the same model, one of which merges, answer the same prompts in turns. The table has the
medians, and the median of the pairs' ratios with its quartiles; "CPU" is the ratio of their processor times,
which other programs disturb less. "merge" is the time of a merge while nothing runs, and "steps" how many
times as long steps take meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, events
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.spec import ModelSpec
from aioengine.schedulers import Decision, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from benchmarks.shared.engines import random_prompts, run_once, started
from benchmarks.shared.report import arguments, console, new_table
from benchmarks.shared.turns import in_turns, quartiles

MODES = (True, False)


class Merge(FCFS):
    """fcfs, which merges ``name``."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        return decision if self.name is None else decision._replace(merge=[self.name])


class Heard:
    """Merges, and the times of decode steps since they were last taken."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.steps: list[float] = []
        self.merges: asyncio.Queue[float] = asyncio.Queue()
        engine.add_listener(self)

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.AdapterMerged):
            self.merges.put_nowait(event.seconds)
        elif isinstance(event, events.StepFinished) and not event.prefill_tokens:
            self.steps.append(event.seconds)

    def taken(self) -> float:
        steps, self.steps = self.steps, []
        return statistics.median(steps)


async def merge(engine: AsyncEngine, policy: Merge, heard: Heard, prompts: list[list[int]]) -> list[float]:
    """Have one adapter merged alone, then the other one beside decodes, then the first again. Returns the
    seconds of the first merge, and how much longer steps take beside one."""
    policy.name = "a"
    await run_once(engine, prompts[:1], 2, ["a"])
    seconds = await heard.merges.get()
    policy.name = "b"
    work = asyncio.ensure_future(run_once(engine, prompts, 32, ["b"]))
    await heard.merges.get()
    beside = heard.taken()
    await work
    policy.name = None
    await run_once(engine, prompts, 32, ["a"])
    heard.taken()
    await run_once(engine, prompts, 32, ["a"])
    slowdown = beside / heard.taken()
    policy.name = "a"
    await run_once(engine, prompts[:1], 2, ["a"])
    await heard.merges.get()
    return [seconds, slowdown]


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    title = f"{args.model}, {args.dtype}, {args.output_tokens} output tokens each, {args.rounds} rounds"
    columns = ("tok/s beside", "merged", "ratio", "quartiles", "CPU", "merge, s", "steps")
    table = new_table(title, "rank", "requests", *columns, texts=0)
    spec, rng = read_spec(resolve_model(args.model)), random.Random(0)
    for rank in args.ranks:
        for count in args.requests:
            prompts = random_prompts(spec.vocab_size, count, 32, rng)
            table.add_row(f"{rank}", f"{count}", *await row(args, spec, rank, prompts))
    console().print(table)


async def row(args: argparse.Namespace, spec: ModelSpec, rank: int, prompts: list[list[int]]) -> list[str]:
    """Return the cells of a row, from the rates on."""
    policy = Merge()
    configs = {
        mode: EngineConfig(
            model=args.model,
            dtype=args.dtype,
            max_model_len=32 + args.output_tokens,
            max_num_seqs=len(prompts),
            kv_cache_memory="512MiB",
            enable_prefix_caching=False,
            lora=LoRAConfig(max_loras=2, max_lora_rank=rank, merge=mode),
        )
        for mode in MODES
    }
    with tempfile.TemporaryDirectory() as folder:
        adapters = {
            name: write_random_adapter(Path(folder) / name, spec, rank, seed=seed)
            for seed, name in enumerate("ab")
        }
        async with started(configs, adapters, {True: policy}) as engines:
            merges = await merge(engines[True], policy, Heard(engines[True]), prompts)
            work = {
                mode: partial(run_once, engine, prompts, args.output_tokens, ["a"])
                for mode, engine in engines.items()
            }
            await in_turns(work, 1)  # warm-up
            runs = await in_turns(work, args.rounds)
            assert engines[True].stats().merged == "a"
    rates = {mode: [run.result[0] for run in runs[mode]] for mode in MODES}
    low, middle, high = quartiles(rates[True], rates[False])
    found = [f"{statistics.median(rates[mode]):.1f}" for mode in (False, True)]
    used, used_merged = ([run.processor for run in runs[mode]] for mode in (False, True))
    spent = quartiles(used, used_merged)[1]
    cells = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{spent:.3f}"]
    return [*found, *cells, f"{merges[0]:.2f}", f"{merges[1]:.2f}"]


if __name__ == "__main__":
    asyncio.run(main())
