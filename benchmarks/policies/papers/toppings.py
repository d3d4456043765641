"""Toppings: what steps that wait for loads cost, and an order that knows ranks."""

from __future__ import annotations

import msgspec
from rich.table import Table

from aioengine.lab import Experiment, WorkloadSpec
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.presets import load_costs
from benchmarks.policies.papers.chameleon import STALLS
from benchmarks.policies.papers.runs import Lab, figures, mean, ratios
from benchmarks.policies.routing import interval

LINK = 6e9
"""Bytes a second to the device, for adapters of many small tensors."""


def on_a10g(*, stalls: bool, padded: bool) -> CostModel:
    """Return the A10G's estimate with a slow link, whose copies hold up the batch or not, and kernels that
    pad ranks or not."""
    costs = load_costs("llama3-8b-a10g")
    slot = msgspec.structs.replace(costs.slot, bandwidth=LINK, slowdown=STALLS if stalls else 1.0)
    return msgspec.structs.replace(
        costs, slot=slot, steps=msgspec.structs.replace(costs.steps, padded=padded)
    )


def toppings(lab: Lab) -> Table:
    """Toppings, ATC'25: average latency of requests up to 1.7 times lower than where loads interrupt
    decoding, and up to 99% of requests within their objective with rank-aware scheduling.

    The lab has no computation of adapters on the CPU. Its upper bound is a copy that costs the batch
    nothing: the request itself waits for its adapter here, and would not there.
    """
    seeds = [0] if lab.quick else [0, 1, 2]
    requests = 40 if lab.quick else 500
    rates = [2.0] if lab.quick else [1.5, 2.0, 2.5]
    systems = {
        "loads stall the batch": ("stalls", "vllm+discard+lookahead"),
        "loads beside the batch": ("beside", "vllm+discard+lookahead"),
        "the same, adapters stay": ("beside", "vllm+lru+lookahead"),
        "the same, rank-aware": ("beside", "toppings"),
    }
    presets = {
        name: lab.preset(name, on_a10g(stalls=name == "stalls", padded=True)) for name in ("stalls", "beside")
    }

    def experiment(rate: float, system: tuple[str, str], seed: int) -> Experiment:
        preset, policy = system
        workload = WorkloadSpec(
            arrivals=f"poisson:rate={rate:g}",
            limit=requests,
            adapters=200,
            popularity="zipf:1.0",
            ranks="8:0.25,16:0.25,32:0.25,64:0.25",
            prompt_tokens="lognormal:median=200,sigma=0.8,max=2000",
            output_tokens="lognormal:median=128,sigma=0.8,max=1000",
            slo="proportional:2+0.06",
        )
        return Experiment(
            workload=workload,
            policy=policy,
            preset=presets[preset],
            slots=14,
            cpu_loras=200,
            max_lora_rank=64,
            max_num_seqs=32,
            seed=seed,
        )

    grid = [(rate, system) for rate in rates for system in systems.values()]
    found = iter(lab.run([experiment(*setting, seed) for setting in grid for seed in seeds]))
    table = Table(title=f"Toppings: means over {len(seeds)} seeds")
    for column in ("requests/s", "system", "latency, s", "stalls' to it", "within the objective, %"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for rate in rates:
        base: list[float] = []
        for name in systems:
            runs = [next(found) for _ in seeds]
            latency = figures(runs, "latency_seconds.mean")
            base = base or latency
            within = [100 * share for share in figures(runs, "slo.in_time_share")]
            table.add_row(
                f"{rate:g}",
                name,
                interval(latency),
                f"{mean(ratios(base, latency)):.2f}",
                interval(within, 1),
            )
        table.add_section()
    return table
