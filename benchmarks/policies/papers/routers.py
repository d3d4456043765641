"""Comparisons of routers: one hot adapter (Ray Serve's issue), and repeated long prefixes (llm-d)."""

from __future__ import annotations

import argparse

from rich.table import Table

from aioengine.lab import Experiment, WorkloadSpec
from benchmarks.policies.papers.runs import Lab, figures, ratios
from benchmarks.policies.routing import hot, interval


def ray(lab: Lab) -> Table:
    """Ray Serve, issue 48741: with 50 users of one model, one of two replicas gets all requests."""
    routers = ["holder", "holder:spill=4", "least_loaded", "affinity"]
    return hot(argparse.Namespace(routers=routers, users=50, each=2 if lab.quick else 10))


def llmd(lab: Lab) -> Table:
    """llm-d, precise prefix-cache routing against a Kubernetes service (dev.to/andygolubev, 8 A10G, 512
    callers): 2.3 times the output tokens a second, and a mean time to first token of 0.86 s in place of 19.

    Eight replicas of an 8B model on an A10G, and 256 callers, each of whom sends the next prompt when the
    last is answered: one of 24 long beginnings, and a short part of its own.
    """
    seeds = [0] if lab.quick else [0, 1, 2]
    requests, callers = (96, 48) if lab.quick else (1000, 256)
    routers = ["round_robin", "least_loaded", "tiers", "prefix", "affinity"]

    def experiment(router: str, seed: int) -> Experiment:
        workload = WorkloadSpec(
            concurrency=callers,
            limit=requests,
            adapters=8,
            shared_prefix="tokens:4096,groups=24,alpha=0",
            prompt_tokens="uniform:64..256",
            output_tokens="uniform:64..192",
        )
        return Experiment(
            workload=workload,
            preset="llama3-8b-a10g",
            slots=8,
            cpu_loras=8,
            max_lora_rank=16,
            enable_prefix_caching=True,
            replicas=8,
            router=router,
            seed=seed,
        )

    found = iter(lab.run([experiment(router, seed) for router in routers for seed in seeds]))
    table = Table(title=f"llm-d: 8 replicas, {callers} callers, means over {len(seeds)} seeds")
    for column in ("router", "output tokens/s", "to round robin's", "TTFT mean, s", "to round robin's"):
        table.add_column(column, justify="left" if column == "router" else "right")
    base: tuple[list[float], list[float]] | None = None
    for router in routers:
        runs = [next(found) for _ in seeds]
        speed = figures(runs, "output_tokens_per_second")
        ttft = figures(runs, "ttft_seconds.mean")
        base = base or (speed, ttft)
        table.add_row(
            router,
            interval(speed, 0),
            interval(ratios(speed, base[0])),
            interval(ttft),
            interval(ratios(ttft, base[1])),
        )
    return table
