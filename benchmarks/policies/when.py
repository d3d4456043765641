"""When each policy wins and when it loses: five workloads, every policy against ``fcfs``.

    python -m benchmarks.policies.when            # all policies
    python -m benchmarks.policies.when --quick    # as in docs/policies.md

Each cell is the mean over seeds of the ratio to ``fcfs`` for the same arrivals (below 1 is better), with its
95% interval by Student's t; of "goodput" the difference in percentage points (above 0 is better).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from aioengine.lab import Experiment, WorkloadSpec, run
from benchmarks.policies.intervals import mean_and_half
from benchmarks.shared.report import arguments, console, new_table

POLICIES = (
    *("lpm", "session", "toppings", "drainer", "admission", "chameleon"),
    *("slora", "sjf", "edf", "vllm+lru", "discard"),
)
GOODPUT = "goodput"


class Case(NamedTuple):
    figures: dict[str, str]
    """Paths of measures in a summary, with dots, or "goodput"; by the heads of their columns."""
    workload: dict[str, Any]
    system: dict[str, Any]


def cases(requests: int) -> list[Case]:
    """Return the workloads. Fields that are not named are the same in all."""
    base = {
        "limit": requests,
        "adapters": 100,
        "popularity": "zipf:1.0",
        "prompt_tokens": "lognormal:median=400,sigma=1.0,max=4096",
        "output_tokens": "lognormal:median=128,sigma=0.8,max=1024",
    }
    cold = {**base, "arrivals": "gamma:rate=12,cv=3"}
    mixed = {**base, "arrivals": "poisson:rate=14", "ranks": "8:0.6,16:0.2,128:0.2"}
    late = {**base, "arrivals": "poisson:rate=30", "timeout": "proportional:2+0.03"}
    chats = {
        **base,
        "arrivals": "poisson:rate=4",
        "adapters": 8,
        "sessions": "chat:turns=5,think=2",
        "shared_prefix": "tokens:1024,groups=8,alpha=1",
    }
    few = {"max_num_seqs": 32}
    return [
        Case({"bursts, 6 slots:\np99 first token": "ttft_seconds.p99"}, cold, {"slots": 6}),
        Case(
            {
                "ranks 8 to 128:\nmean token gap": "inter_token_seconds.mean",
                "ranks 8 to 128:\nmean first token": "ttft_seconds.mean",
            },
            mixed,
            {"max_lora_rank": 128, **few},
        ),
        Case({"overload, deadlines:\ngoodput, points": GOODPUT}, late, {"slots": 32, **few}),
        Case(
            {"chats, small cache:\nmean first token": "ttft_seconds.mean"},
            chats,
            {"enable_prefix_caching": True, "kv_cache_memory": "3GiB", "on_too_long": "truncate", **few},
        ),
    ]


def measure(case: Case, policy: str, seed: int) -> list[float]:
    """Run a policy, and return the case's figures."""
    workload = WorkloadSpec(**case.workload)
    experiment = Experiment(
        workload=workload, policy=policy, seed=seed, **{"slots": 16, "cpu_loras": 100, **case.system}
    )
    with tempfile.TemporaryDirectory() as folder:
        summary = run(experiment, Path(folder)).summary
    found = []
    for figure in case.figures.values():
        if figure == GOODPUT:
            found.append(100 * float(summary["slo"]["requests_in_time"]) / summary["requests_offered"])
        else:
            group, _, name = figure.partition(".")
            found.append(float(summary[group][name]))
    return found


def columns(found: Sequence[Case], policy: str, seeds: int) -> list[tuple[float, ...]]:
    """Return the values of each figure, one for each seed."""
    rows = [[measure(case, policy, seed) for seed in range(seeds)] for case in found]
    return [column for row in rows for column in zip(*row, strict=True)]


def cell(figure: str, ours: Sequence[float], base: Sequence[float]) -> str:
    pairs = zip(ours, base, strict=True)
    values = [a - b if figure == GOODPUT else a / b for a, b in pairs]
    mean, half = mean_and_half(values)
    return f"{mean:+.1f} ± {half:.1f}" if figure == GOODPUT else f"{mean:.2f} ± {half:.2f}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    given = parser.parse_args()
    requests, seeds = (250, 3) if given.quick else (1000, 5)
    found = cases(requests)
    figures = {head: figure for case in found for head, figure in case.figures.items()}
    bases = columns(found, "fcfs", seeds)
    title = f"against fcfs, {requests:,} requests, {seeds} seeds"
    table = new_table(title, "policy", *figures)
    table.add_row("fcfs itself", *(f"{fmean(base):.3g}" for base in bases))
    for policy in given.policies:
        table.add_row(policy, *map(cell, figures.values(), columns(found, policy, seeds), bases))
    console(160).print(table)


if __name__ == "__main__":
    main()
