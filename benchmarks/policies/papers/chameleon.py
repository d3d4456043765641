"""Chameleon: p99 time to first token against S-LoRA as its authors ran it."""

from __future__ import annotations

import msgspec
from rich.table import Table

from aioengine.lab import Experiment, WorkloadSpec
from aioengine.lab.costs.model import CostModel, ModelShape, Stage
from aioengine.lab.costs.roofline import A10G, estimate
from benchmarks.policies.papers.runs import Lab, figures, mean, ratios
from benchmarks.policies.routing import interval

LLAMA_7B = ModelShape(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    max_position=4096,
    dtype="float16",
)
"""Llama 7B (arXiv 2302.13971)."""
STALLS = 1e6
"""Slowdown of a step while an adapter is copied: the step does not advance."""


def llama_on_a40(link: float, *, stalls: bool) -> CostModel:
    """Return the cost model of the paper's machine: an A40 (NVIDIA's data sheet: 48 GB, 696 GB/s, 149.7
    TFLOPS in float16 without sparsity).

    Args:
        link: Bytes a second from the host's memory to the device.
        stalls: Whether the batch waits while an adapter is copied, as it does in S-LoRA.
    """
    a40 = msgspec.structs.replace(
        A10G, memory=45 * 2**30, bandwidth=696e9, flops=149.7e12, host_to_device=link
    )
    costs = estimate("llama-7b-a40", "one A40 48 GB", LLAMA_7B, a40)
    slowdown = STALLS if stalls else costs.slot.slowdown
    return msgspec.structs.replace(costs, slot=Stage(costs.slot.latency, link, slowdown=slowdown))


def chameleon(lab: Lab) -> Table:
    """Chameleon, arXiv 2411.17741: p99 time to first token 80.7% below S-LoRA's at high load.

    The baseline is what the paper describes: order of arrival, adapters copied on demand and ahead for
    queued requests, in the memory of the KV cache, and dropped when no request uses them any more. The batch
    waits for copies. Between the baseline and Chameleon are its two parts alone. All requests may wait
    without bound (``max_wait``, ``age``), as in the paper's systems.
    """
    seeds = [0] if lab.quick else [0, 1, 2]
    requests = 40 if lab.quick else 500
    rates = [2.0] if lab.quick else [2.2, 3.0]
    links = [6e9] if lab.quick else [24.8e9, 6e9]
    systems = {
        "S-LoRA: arrival, discard": "vllm:max_wait=600+discard+lookahead",
        "Chameleon's cache alone": "vllm:max_wait=600+chameleon+lookahead",
        "Chameleon's order alone": "chameleon:age=600,max_wait=600+discard+lookahead",
        "Chameleon": "chameleon:age=600,max_wait=600",
    }
    presets = {link: lab.preset(f"a40-{link:g}", llama_on_a40(link, stalls=True)) for link in links}

    def experiment(link: float, rate: float, policy: str, seed: int) -> Experiment:
        workload = WorkloadSpec(
            arrivals=f"poisson:rate={rate:g}",
            limit=requests,
            adapters=100,
            popularity="zipf:1.0",
            ranks="8:0.2,16:0.2,32:0.2,64:0.2,128:0.2",
            prompt_tokens="lognormal:median=200,sigma=1.0,max=3000",
            output_tokens="lognormal:median=128,sigma=1.0,max=1000",
        )
        return Experiment(
            workload=workload,
            policy=policy,
            preset=presets[link],
            slots=100,
            slot_memory="16GiB",
            cpu_loras=100,
            max_lora_rank=128,
            max_num_seqs=128,
            seed=seed,
        )

    grid = [(link, rate, policy) for link in links for rate in rates for policy in systems.values()]
    found = iter(lab.run([experiment(*setting, seed) for setting in grid for seed in seeds]))
    table = Table(title=f"Chameleon: time to first token in seconds, means over {len(seeds)} seeds")
    for column in ("link, GB/s", "requests/s", "system", "copies/request", "p50", "p99", "p99 to S-LoRA's"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for link in links:
        for rate in rates:
            base: list[float] = []
            for name in systems:
                runs = [next(found) for _ in seeds]
                p99 = figures(runs, "ttft_seconds.p99")
                base = base or p99
                table.add_row(
                    f"{link / 1e9:g}",
                    f"{rate:g}",
                    name,
                    f"{mean(figures(runs, 'swaps.slot_copies_per_request')):.2f}",
                    interval(figures(runs, "ttft_seconds.p50")),
                    interval(p99),
                    interval(ratios(p99, base)),
                )
            table.add_section()
    return table
