"""The main experiments of three papers in simulation. Results are printed, and nothing is asserted.

    python -m benchmarks.policies.papers slora        # throughput from 5 to 1,000 adapters
    python -m benchmarks.policies.papers chameleon    # p99 time to first token at high load, against S-LoRA
    python -m benchmarks.policies.papers vtc          # difference of service between two backlogged clients

``--quick`` runs a small part of each, in seconds. Setups and results: docs/lab-papers.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from aioengine.lab import Experiment, WorkloadSpec, run

Run = Callable[[Sequence[Experiment]], list[dict[str, Any]]]
"""Summaries of experiments, in their order."""


def slora(run_all: Run, quick: bool) -> Table:
    """S-LoRA, arXiv 2311.03285: throughput hardly falls from 5 to 1,000 adapters and more.

    Arrivals and lengths are the paper's synthetic ones (Gamma with CV 1; 8 to 512 tokens, uniform), at a rate
    above what the engine can serve, so that the result is its highest throughput.
    """
    counts = [5, 100] if quick else [5, 20, 100, 200, 1000, 2000]
    requests = 40 if quick else 600

    def experiment(adapters: int, policy: str, slots: int, cpu_loras: int) -> Experiment:
        workload = WorkloadSpec(
            arrivals="gamma:rate=8,cv=1",
            limit=requests,
            adapters=adapters,
            popularity="power:1.0",
            ranks=8,
            prompt_tokens="uniform:8..512",
            output_tokens="uniform:8..512",
        )
        return Experiment(
            workload=workload,
            policy=policy,
            preset="llama3-8b-a10g",
            slots=slots,
            cpu_loras=cpu_loras,
            max_lora_rank=8,
            max_num_seqs=32,
        )

    systems: dict[str, Callable[[int], Experiment]] = {
        "slora, 32 slots, memory for all": lambda n: experiment(n, "slora", 32, max(n, 32)),
        "on demand, 32 slots": lambda n: experiment(n, "vllm+lru", 32, 32),
        "on demand, 8 slots": lambda n: experiment(n, "vllm+lru", 8, 8),
    }
    found = iter(run_all([make(n) for make in systems.values() for n in counts]))
    table = Table(title="S-LoRA: requests a second, by number of adapters")
    table.add_column("system")
    for n in counts:
        table.add_column(f"{n:,}", justify="right")
    table.add_column("last / first", justify="right")
    for name in systems:
        rates = [next(found)["requests_per_second"] for _ in counts]
        table.add_row(name, *(f"{rate:.2f}" for rate in rates), f"{rates[-1] / rates[0]:.0%}")
    return table


def chameleon(run_all: Run, quick: bool) -> Table:
    """Chameleon, arXiv 2411.17741: at high load the p99 time to first token is far below S-LoRA's.

    Adapters have ranks 8 to 128, and lengths are heavy-tailed. ``max_wait`` and ``age`` bound how long a
    request can be passed over. In an overload with longer waits, every policy serves the oldest first, and
    all look alike. So both are set to more than any wait (the papers' systems have no such bound), and the
    defaults are run as well. First come, first served is included because Chameleon's authors ran S-LoRA in
    that order; ``slora`` prefers the adapters of the batch.
    """
    rates = [12] if quick else [8, 10, 12, 14]
    seeds = [0] if quick else [0, 1, 2]
    requests = 50 if quick else 800
    policies = {
        "slora": "slora:age=600,max_wait=600",
        "chameleon": "chameleon:age=600,max_wait=600",
        "fcfs": "fcfs:max_wait=600",
        "slora, defaults": "slora",
        "chameleon, defaults": "chameleon",
    }

    def experiment(rate: int, policy: str, seed: int) -> Experiment:
        workload = WorkloadSpec(
            arrivals=f"poisson:rate={rate}",
            limit=requests,
            adapters=100,
            popularity="zipf:1.0",
            ranks="8:0.2,16:0.2,32:0.2,64:0.2,128:0.2",
            prompt_tokens="lognormal:median=200,sigma=1.0,max=4096",
            output_tokens="lognormal:median=128,sigma=1.0,max=2048",
        )
        return Experiment(
            workload=workload,
            policy=policy,
            slots=16,
            cpu_loras=100,
            max_lora_rank=128,
            max_num_seqs=32,
            seed=seed,
        )

    grid = [(rate, policy) for rate in rates for policy in policies.values()]
    found = iter(run_all([experiment(*setting, seed) for setting in grid for seed in seeds]))
    table = Table(title=f"Chameleon: time to first token in seconds, means over {len(seeds)} seeds")
    for column in ("requests/s", "policy", "p50", "p99", "p99 to S-LoRA's", "longest wait"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for rate in rates:
        base = 0.0
        for name in policies:
            runs = [next(found) for _ in seeds]
            p50, p99 = (_mean([r["ttft_seconds"][p] for r in runs]) for p in ("p50", "p99"))
            if name.startswith("slora"):
                base = p99
            worst = _mean([r["ttft_seconds"]["max"] for r in runs])
            gain = f"{p99 / base - 1:+.0%}"
            table.add_row(f"{rate}", name, f"{p50:.2f}", f"{p99:.2f}", gain, f"{worst:.1f}")
        table.add_section()
    return table


class Clients(NamedTuple):
    """Two tenants that ask for more than the engine can serve, one for twice as much."""

    adapters: int
    slots: int

    def __str__(self) -> str:
        return f"{self.adapters} adapters, {self.slots} slots"


LONGEST_PROMPT, LONGEST_OUTPUT, SEQUENCES = 256, 128, 16


def vtc(run_all: Run, quick: bool) -> Table:
    """VTC, OSDI 2024, arXiv 2401.00588: the service of two backlogged clients differs by no more than
    2 max(input_weight x longest prompt, output_weight x M), however long they are backlogged.

    M is the number of tokens that fit in a batch: here sequences times their maximum. Prompt and output
    tokens have the same weight, 1, as in the lab's figure. ``fcfs`` without its shares is first come, first
    served.
    """
    requests = [100, 200] if quick else [250, 500, 1000, 2000]
    policies = {"fcfs:fair=false": "fcfs:fair=false", "vtc": "vtc:input_weight=1,output_weight=1"}
    settings = [Clients(4, 4), Clients(40, 40), Clients(40, 4)]
    if quick:
        settings = settings[:1]

    def experiment(clients: Clients, policy: str, limit: int) -> Experiment:
        workload = WorkloadSpec(
            arrivals="poisson:rate=60",
            limit=limit,
            adapters=clients.adapters,
            tenants=2,
            tenant_shares="1,2",
            prompt_tokens=f"uniform:8..{LONGEST_PROMPT}",
            output_tokens=f"uniform:8..{LONGEST_OUTPUT}",
        )
        return Experiment(
            workload=workload,
            policy=policy,
            slots=clients.slots,
            cpu_loras=max(clients.adapters, clients.slots),
            max_lora_rank=16,
            max_num_seqs=SEQUENCES,
        )

    grid = [(clients, name) for clients in settings for name in policies]
    settled = [(clients, policies[name], limit) for clients, name in grid for limit in requests]
    found = iter(run_all([experiment(*setting) for setting in settled]))
    bound = 2 * max(LONGEST_PROMPT, SEQUENCES * (LONGEST_PROMPT + LONGEST_OUTPUT))
    table = Table(title=f"VTC: largest difference of service in tokens, by requests; bound {bound:,}")
    table.add_column("setting")
    table.add_column("policy")
    for limit in requests:
        table.add_column(f"{limit:,}", justify="right")
    for clients, name in grid:
        gaps = [next(found)["fairness"]["max_service_difference_tokens"] for _ in requests]
        table.add_row(str(clients), name, *(f"{gap:,}" for gap in gaps))
    return table


PAPERS: dict[str, Callable[[Run, bool], Table]] = {"slora": slora, "chameleon": chameleon, "vtc": vtc}


def summary_of(experiment: Experiment) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run(experiment, folder).summary


def in_processes(jobs: int) -> Run:
    """Return a function that runs ``jobs`` experiments at a time."""

    def run_all(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
        if jobs == 1:
            return list(map(summary_of, experiments))
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            return list(pool.map(summary_of, experiments))

    return run_all


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--quick", action="store_true", help="a small part of it")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    Console().print(PAPERS[args.paper](in_processes(args.jobs), args.quick))


if __name__ == "__main__":
    main()
