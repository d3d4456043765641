"""LoRAServe: a fleet whose replicas each have adapters of like ranks."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.table import Table

from aioengine.lab import Experiment, WorkloadSpec
from aioengine.lab.costs.presets import load_costs
from aioengine.schedulers.routing import FleetView, Route, RouteRequest, RouterPolicy
from benchmarks.policies.papers.runs import Lab, figures, ratios
from benchmarks.policies.routing import interval

REPLICAS = 4
RANKS = "8:0.25,16:0.25,32:0.25,64:0.125,128:0.125"


class ByRank(RouterPolicy):
    """Adapters in order of their size, cut into as many parts of equal demand as there are replicas.

    Args:
        every: Seconds between two cuts.
        slack: A request leaves its part for a neighbouring one once this many more requests wait there.
    """

    source = "Jaiswal et al. 2025, LoRAServe (2511.22880): rank-aware placement that follows demand"
    worst_case = "until the next cut, a part whose demand grows waits for its replica, or its neighbours"

    def __init__(self, every: float = 10.0, slack: int = 8) -> None:
        self._every = every
        self._slack = slack
        self._next = 0.0
        self._part: dict[str, int] = {}

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        replicas = [replica for replica in view.accepting if replica.replica_id not in request.tried]
        if not replicas:
            return Route()
        if view.now >= self._next:
            self._next = view.now + self._every
            self._part = parts(view, len(replicas))
        part = min(self._part.get(request.adapter or "", 0), len(replicas) - 1)
        near = range(max(part - 1, 0), min(part + 2, len(replicas)))
        least = min(near, key=lambda index: (replicas[index].waiting, abs(index - part)))
        if replicas[part].waiting > replicas[least].waiting + self._slack:
            part = least
        return Route([replicas[part].replica_id], reason="rank")


def parts(view: FleetView, count: int) -> dict[str, int]:
    """Return the part of each adapter. An adapter without demand yet counts as one with very little."""
    names = sorted(view.adapters, key=lambda name: (view.adapters[name].nbytes, name))
    demand = [view.adapters[name].demand + 1e-3 for name in names]
    total, before, found = sum(demand), 0.0, {}
    for name, own in zip(names, demand, strict=True):
        found[name] = min(int((before + own / 2) / total * count), count - 1)
        before += own
    return found


def loraserve(lab: Lab) -> Table:
    """LoRAServe, arXiv 2511.22880: up to 2 times the throughput and up to 9 times lower time to first token
    than systems that batch adapters of all ranks.

    With kernels that pad (each adapter costs what the largest in the batch does, as in Punica's BGMV) and
    with kernels that do not.
    """
    seeds: Sequence[int] = [0] if lab.quick else [0, 1, 2]
    requests = 80 if lab.quick else 600
    rates = [60]
    base_costs = load_costs("llama3-8b-h100")
    presets = {
        kernel: lab.preset(
            kernel.split(" ")[0],
            msgspec.structs.replace(
                base_costs,
                steps=msgspec.structs.replace(base_costs.steps, padded=kernel == "padded ranks"),
            ),
        )
        for kernel in ("padded ranks", "own ranks")
    }
    routers = {
        "least_loaded": "least_loaded",
        "affinity": "affinity",
        "by rank": f"{__name__}:ByRank",
    }

    def experiment(kernel: str, rate: int, router: str, seed: int) -> Experiment:
        workload = WorkloadSpec(
            arrivals=f"poisson:rate={rate}",
            limit=requests,
            adapters=100,
            popularity="zipf:1.0",
            ranks=RANKS,
            prompt_tokens="lognormal:median=400,sigma=0.8,max=4000",
            output_tokens="lognormal:median=128,sigma=0.6,max=1000",
        )
        return Experiment(
            workload=workload,
            preset=presets[kernel],
            slots=32,
            cpu_loras=100,
            max_lora_rank=128,
            max_num_seqs=64,
            replicas=REPLICAS,
            router=router,
            seed=seed,
        )

    grid = [(k, rate, router) for k in presets for rate in rates for router in routers.values()]
    found = iter(lab.run([experiment(*setting, seed) for setting in grid for seed in seeds]))
    table = Table(title=f"LoRAServe: {REPLICAS} replicas, means over {len(seeds)} seeds")
    for column in ("kernels", "requests/s", "router", "TTFT p99, s", "to least_loaded's", "token gap, ms"):
        table.add_column(column, justify="left" if column in ("kernels", "router") else "right")
    for kernel in presets:
        for rate in rates:
            base: list[float] = []
            for name in routers:
                runs = [next(found) for _ in seeds]
                p99 = figures(runs, "ttft_seconds.p99")
                base = base or p99
                gaps = [1e3 * gap for gap in figures(runs, "inter_token_seconds.mean")]
                table.add_row(
                    kernel, f"{rate}", name, interval(p99), interval(ratios(p99, base)), interval(gaps, 1)
                )
            table.add_section()
    return table
