"""VTC: service of two clients that ask for more than there is."""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table

from aioengine.lab import Experiment, WorkloadSpec
from benchmarks.policies.papers.runs import Lab


class Clients(NamedTuple):
    """Two tenants that ask for more than the engine can serve, one for twice as much."""

    adapters: int
    slots: int

    def __str__(self) -> str:
        return f"{self.adapters} adapters, {self.slots} slots"


LONGEST_PROMPT, LONGEST_OUTPUT, SEQUENCES = 256, 128, 16


def vtc(lab: Lab) -> Table:
    """VTC, OSDI 2024, arXiv 2401.00588: the service of two backlogged clients differs by no more than
    2 max(input_weight x longest prompt, output_weight x M), however long they are backlogged.

    M is the number of tokens that fit in a batch: here sequences times their maximum. Prompt and output
    tokens have the same weight, 1, as in the lab's figure. ``fcfs`` without its shares is first come, first
    served.
    """
    requests = [100, 200] if lab.quick else [250, 500, 1000, 2000]
    policies = {"fcfs:fair=false": "fcfs:fair=false", "vtc": "vtc:input_weight=1,output_weight=1"}
    settings = [Clients(4, 4), Clients(40, 40), Clients(40, 4)]
    if lab.quick:
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
    found = iter(lab.run([experiment(*setting) for setting in settled]))
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
