"""Claims about fleets, run again in simulation. Setups and results: docs/lab-papers.md."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import msgspec

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.fleet.config import FleetConfig
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.fleet.fleet import SimulatedFleet
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.request import SamplingParams
from aioengine.schedulers.routing import FleetView, Route, RouteRequest, RouterPolicy
from benchmarks.report import Table
from benchmarks.shared.simulated import compared, presets


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


def loraserve(*, requests: int = 600, seeds: int = 3, jobs: int = 0) -> Iterator[Table]:
    """LoRAServe, arXiv 2511.22880: up to 9 times lower time to first token where ranks are kept apart.

    With kernels that pad (each adapter costs what the largest in the batch does) and with others.
    """
    workload = {
        "arrivals": "poisson:rate=60", "limit": requests, "adapters": 100, "popularity": "zipf:1.0",
        "ranks": "8:0.25,16:0.25,32:0.25,64:0.125,128:0.125",
        "prompt_tokens": "lognormal:median=400,sigma=0.8,max=4000",
        "output_tokens": "lognormal:median=128,sigma=0.6,max=1000",
    }  # fmt: skip
    routers = {"least_loaded": "least_loaded", "affinity": "affinity", "by rank": f"{__name__}:ByRank"}
    systems = {name: {"router": router} for name, router in routers.items()}
    figures = {"TTFT p99, s": "ttft_seconds.p99", "token gap, s": "inter_token_seconds.mean"}
    base = load_costs("llama3-8b-h100")
    costs = {
        name: msgspec.structs.replace(base, steps=msgspec.structs.replace(base.steps, padded=padded))
        for name, padded in (("padded ranks", True), ("own ranks", False))
    }
    with presets(costs) as files:
        for kernels, preset in files.items():
            common = {
                "workload": workload, "preset": preset, "slots": 32, "cpu_loras": 100, "max_lora_rank": 128,
                "max_num_seqs": 64, "replicas": 4,
            }  # fmt: skip
            title = f"LoRAServe: 4 replicas, kernels of {kernels}"
            yield compared(title, systems, figures, common=common, seeds=seeds, jobs=jobs)


def ray(
    *,
    routers: tuple[str, ...] = ("holder", "holder:spill=4", "least_loaded", "affinity"),
    users: int = 50,
    each: int = 10,
) -> Iterator[Table]:
    """Ray Serve, issue 48741: with 50 users of one model, one of two replicas gets all requests.

    Each user sends a request when the last is answered. "most": the largest share of a replica, in fair
    shares.
    """
    rows = []
    for router in routers:
        counts, seconds = run_in_virtual_time(_closed_loop(router, users, each))
        most = max(counts) / (sum(counts) / len(counts))
        rows.append([router, " : ".join(map(str, counts)), f"{most:.2f}", f"{seconds:.1f}"])
    yield Table(
        f"{users} users of one adapter, two replicas", ["router", "requests", "most", "seconds"], rows
    )


async def _closed_loop(router: str, users: int, each: int) -> tuple[list[int], float]:
    """Return the requests of each replica, and how long all took."""
    costs = load_costs("llama3-8b-h100")
    config = EngineConfig(model="llama3-8b-h100", lora=LoRAConfig(max_loras=4, max_cpu_loras=16))
    rng = random.Random(0)
    fleet = SimulatedFleet(
        FleetConfig(engine=config, replicas=2, router=router), lambda: SimulatedEngine(config, costs)
    )
    async with fleet:
        fleet.add_adapters([AdapterShape("hot", 16)])

        async def user(index: int) -> None:
            for turn in range(each):
                prompt = [0] * rng.randrange(64, 512)
                params = SamplingParams(max_tokens=rng.randrange(32, 128))
                await fleet.complete(prompt, params, adapter="hot", request_id=f"u{index}-{turn}")

        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(user(index) for index in range(users)))
        return fleet.by_replica, asyncio.get_running_loop().time() - start


def llmd(*, requests: int = 1000, callers: int = 256, seeds: int = 3, jobs: int = 0) -> Iterator[Table]:
    """llm-d, prefix-cache routing against a Kubernetes service: 2.3 times the output tokens a second.

    Eight replicas of an 8B model on an A10G. Each caller sends the next prompt when the last is answered: one
    of 24 long beginnings, and a short part of its own.
    """
    workload = {
        "concurrency": callers, "limit": requests, "adapters": 8,
        "shared_prefix": "tokens:4096,groups=24,alpha=0", "prompt_tokens": "uniform:64..256",
        "output_tokens": "uniform:64..192",
    }  # fmt: skip
    common = {
        "workload": workload, "preset": "llama3-8b-a10g", "slots": 8, "cpu_loras": 8, "max_lora_rank": 16,
        "enable_prefix_caching": True, "replicas": 8,
    }  # fmt: skip
    routers = ("round_robin", "least_loaded", "tiers", "prefix", "affinity")
    figures = {"output tok/s": "output_tokens_per_second", "TTFT mean, s": "ttft_seconds.mean"}
    systems = {router: {"router": router} for router in routers}
    yield compared(f"llm-d: {callers} callers", systems, figures, common=common, seeds=seeds, jobs=jobs)


CASES = (loraserve, ray, llmd)
