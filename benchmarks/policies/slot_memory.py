"""Slots of one size, by bytes, and in one memory with the KV cache, in simulation: mixed ranks on a trace.

    python -m benchmarks.policies.slot_memory AzureLLMInferenceTrace_code.csv

All have the same memory: that of ``--slots`` slots of rank 64, and of ``--kv`` for the KV cache. Where slots
share theirs, ``--most`` adapters may be in it.
Printed for each policy: copies into slots for each request (moves of adapters counted), and times to first
token; means over the seeds, with half the width of their 95% intervals (Student's t), and the ratio of means.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import t as student

from aioengine.checks import parse_bytes
from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.lab.costs.presets import load_costs

MEASURES = {
    "copies a request": lambda summary: summary["swaps"]["slot_copies_per_request"],
    "mean TTFT, s": lambda summary: summary["ttft_seconds"]["mean"],
    "p99 TTFT, s": lambda summary: summary["ttft_seconds"]["p99"],
}


def measure(experiment: Experiment) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        summary: dict[str, Any] = run(experiment, folder).summary
    return [measure(summary) for measure in MEASURES.values()]


def text(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--policies", nargs="*", default=["fcfs", "fcfs+gdsf", "chameleon"])
    parser.add_argument("--ranks", default="8:0.7,16:0.2,64:0.1")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16, help="slots of one size")
    parser.add_argument("--most", type=int, default=128, help="adapters in a memory that slots share")
    parser.add_argument("--scale", type=float, default=2.0, help="how much faster than in the trace")
    parser.add_argument("--kv", default="16GiB", help="for the KV cache")
    parser.add_argument("--limit", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="llama3-8b-h100")
    args = parser.parse_args()

    kv = parse_bytes(args.kv, field="kv")

    def experiment(policy: str, seed: int, slots: int, memory: int | str | None) -> Experiment:
        workload = WorkloadSpec(
            trace=args.trace,
            limit=args.limit,
            scale=args.scale,
            adapters=args.adapters,
            popularity="zipf:1.0",
            ranks=args.ranks,
        )
        return Experiment(
            workload=workload, policy=policy, preset=args.preset, slots=slots, slot_memory=memory,
            cpu_loras=args.adapters, max_lora_rank=64, seed=seed,
            kv_cache_memory=kv + (total if memory == "shared" else 0),
        )  # fmt: skip

    total = 0
    fixed = experiment("fcfs", 0, args.slots, None)
    memory = total = load_costs(args.preset).plan(fixed.engine_config()).slot_pool_bytes
    table = Table(title=f"{args.adapters} adapters of ranks {args.ranks}, {memory / 2**30:.2f} GiB for slots")
    for heading in ("policy", "slots", *MEASURES):
        table.add_column(heading, justify="left" if heading in ("policy", "slots") else "right")
    console = Console(stderr=True)
    modes: dict[str, tuple[int, int | str | None]] = {
        "of one size": (args.slots, None),
        "by bytes": (args.most, memory),
        "shared": (args.most, "shared"),
    }
    for policy in track(args.policies, console=console, disable=not console.is_terminal):
        means: list[list[float]] = []
        for mode, (slots, shared) in modes.items():
            rows = [measure(experiment(policy, seed, slots, shared)) for seed in range(args.seeds)]
            columns = list(zip(*rows, strict=True))
            means.append([statistics.fmean(column) for column in columns])
            table.add_row(policy, mode, *map(text, columns))
        for mode, after in zip(list(modes)[1:], means[1:], strict=True):
            ratios = [f"{b / a:.2f}" if a else "" for a, b in zip(means[0], after, strict=True)]
            table.add_row("", f"ratio, {mode}", *ratios, style="bold", end_section=mode == "shared")
    Console().print(table)


if __name__ == "__main__":
    main()
