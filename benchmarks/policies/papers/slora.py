"""S-LoRA: throughput from 5 to 2,000 adapters."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from aioengine.lab import Experiment, WorkloadSpec
from benchmarks.policies.papers.runs import Lab


def slora(lab: Lab) -> Table:
    """S-LoRA, arXiv 2311.03285: throughput hardly falls from 5 to 1,000 adapters and more.

    Arrivals and lengths are its synthetic ones (Gamma with CV 1; 8 to 512 tokens, uniform), at a rate
    above what the engine can do, so that the throughput is what it can.
    """
    counts = [5, 100] if lab.quick else [5, 20, 100, 200, 1000, 2000]
    requests = 40 if lab.quick else 600

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
    found = iter(lab.run([make(n) for make in systems.values() for n in counts]))
    table = Table(title="S-LoRA: requests a second, by number of adapters")
    table.add_column("system")
    for n in counts:
        table.add_column(f"{n:,}", justify="right")
    table.add_column("last / first", justify="right")
    for name in systems:
        rates = [next(found)["requests_per_second"] for _ in counts]
        table.add_row(name, *(f"{rate:.2f}" for rate in rates), f"{rates[-1] / rates[0]:.0%}")
    return table
