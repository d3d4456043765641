"""Routers: the cost of a decision, and how the requests of one hot adapter are spread."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.fleet.door import SimulatedFleet
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.request import SamplingParams
from aioengine.schedulers import routing
from benchmarks.report import Table, percentile

PRESET = "llama3-8b-h100"


def decisions(
    *, routers: tuple[str, ...] = tuple(sorted(routing.available_routers())), replicas: int = 64,
    adapters: int = 10_000, count: int = 4000,
) -> Iterator[Table]:  # fmt: skip
    """Processor time of a router's guarded decision, with a random state of each replica."""
    rows = []
    for router in routers:
        took = _decide(router, replicas, adapters, count)
        values = sum(took) / len(took), percentile(took, 0.5), percentile(took, 0.99)
        rows.append([router, *(f"{1e6 * value:.1f}" for value in values)])
    title = f"{replicas} replicas, {adapters:,} adapters: microseconds a decision"
    yield Table(title, ["router", "mean", "p50", "p99"], rows)


def _decide(router: str, replicas: int, adapters: int, count: int) -> list[float]:
    """Return seconds of processor time."""
    rng = random.Random(0)
    now = 100.0
    fleet = routing.FleetState(lambda: now)
    names = [f"adapter-{index}" for index in range(adapters)]
    weights = [1 / (index + 1) for index in range(adapters)]
    for name in names:
        fleet.add_adapter(name)
    for index in range(replicas):
        fleet.join(f"replica-{index}", routing.ReplicaLimits(8, 256, 64, 500_000))
        held = list(dict.fromkeys(rng.choices(names, weights, k=600)))[:256]
        report = routing.Report(
            sent_at=now,
            received=0,
            ended=0,
            waiting=rng.randrange(5),
            running=rng.randrange(40),
            waiting_tokens=rng.randrange(8000),
            running_tokens=rng.randrange(40_000),
            free_kv_tokens=300_000,
            waiting_for=dict.fromkeys(held[100:103], 1),
            load_seconds=0.05,
            slot_seconds=0.004,
            seconds_per_token=2.4e-5,
            tiers=routing.Tiers(held[:8], held[8:]),
        )
        fleet.report(f"replica-{index}", report)
    guard = routing.RouterGuard(routing.load_router(router))
    fleet.listeners.append(guard.tell)
    took = []
    for number, name in enumerate(rng.choices(names, weights, k=count)):
        now += 0.0001
        prefixes = tuple(hash((name, number % 7, block)) & 2**63 - 1 for block in range(4))
        tenant = f"t{number % 50}"
        request = routing.RouteRequest(f"q{number}", name, 1000, 50, tenant=tenant, prefixes=prefixes)
        start = time.thread_time()
        route = guard.route(request, fleet.view)
        took.append(time.thread_time() - start)
        fleet.sent(request, route.replicas[0])
        fleet.ended(request.request_id)
    return took


def hot(
    *, routers: tuple[str, ...] = ("holder", "least_loaded", "affinity"), users: int = 50, each: int = 10
) -> Iterator[Table]:
    """How the requests of many users of one adapter are spread over two replicas, in virtual time.

    Each user sends a request when the last is answered. "most": the largest share of a replica, in fair
    shares (1 is even, 2 is all on one).
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
    costs = load_costs(PRESET)
    config = EngineConfig(model=PRESET, lora=LoRAConfig(max_loras=4, max_cpu_loras=16))
    rng = random.Random(0)
    fleet = SimulatedFleet(
        2, lambda: SimulatedEngine(config, costs), routing.load_router(router), routing.load_placement("none")
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


CASES = (decisions,)
