"""Routers: the cost of a decision, results on traces, and how the requests of one hot adapter are spread.

    python -m benchmarks.policies.routing decisions
    python -m benchmarks.policies.routing traces --azure CSV --mooncake JSONL
    python -m benchmarks.policies.routing hot

``decisions``: 64 replicas and 10,000 adapters by Zipf, with a random state of each replica. Prints the
processor time of a guarded decision, in microseconds.

``traces``: fleets of simulated engines (preset llama3-8b-h100, 8 slots, 32 adapters in the CPU cache) on two
public traces, to whose requests 150 adapters are assigned by Zipf. The Azure trace is sped up. In the
Mooncake trace requests that begin alike keep their adapter, and prefixes are cached; prompts are cut to
64,000 tokens. Prints means over the seeds with their 95% intervals; loads are reads of adapters from
disk. ``ratio`` is to the first router, by seed.

``hot``: 50 users of one adapter on two replicas, each of whom sends a request when the last is answered.
Prints the largest share of a replica, in fair shares (1 is even, 2 is all on one).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.fleet.door import SimulatedFleet
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.runs.simulate import run
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.request import SamplingParams
from aioengine.schedulers import routing
from benchmarks.policies.intervals import interval
from benchmarks.shared.report import new_table, percentile

PRESET = "llama3-8b-h100"


def decisions(args: argparse.Namespace) -> Table:
    title = f"{args.replicas} replicas, {args.adapters:,} adapters: microseconds a decision"
    table = new_table(title, "router", "mean", "p50", "p99")
    for router in args.routers:
        took = _decide(router, args.replicas, args.adapters, args.decisions)
        values = (sum(took) / len(took), percentile(took, 0.5), percentile(took, 0.99))
        table.add_row(router, *(f"{1e6 * value:.1f}" for value in values))
    return table


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
        request = routing.RouteRequest(
            f"q{number}", name, 1000, 50, tenant=f"t{number % 50}", prefixes=prefixes
        )
        start = time.thread_time()
        route = guard.route(request, fleet.view)
        took.append(time.thread_time() - start)
        fleet.sent(request, route.replicas[0])
        fleet.ended(request.request_id)
    return took


def traces(args: argparse.Namespace) -> Table:
    title = f"{args.replicas} replicas, {args.adapters} adapters, {args.seeds} seeds"
    columns = ("loads", "ratio", "TTFT p99, s", "ratio", "TTFT mean, s")
    table = new_table(title, "trace", "router", *columns, texts=2)
    jobs = [
        (trace, router, seed)
        for trace in ("azure", "mooncake")
        if getattr(args, trace) is not None
        for router in args.routers
        for seed in range(args.seeds)
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for trace, router, seed in track(jobs, "simulating", console=Console(stderr=True)):
        found.setdefault((trace, router), []).append(_play(args, trace, router, seed))
    for (trace, router), runs in found.items():
        base = found[trace, args.routers[0]]
        loads, p99 = ([_figure(one, kind) for one in runs] for kind in ("loads", "p99"))
        before, p99_before = ([_figure(one, kind) for one in base] for kind in ("loads", "p99"))
        table.add_row(
            trace,
            router,
            interval(loads, 0),
            interval([a / b for a, b in zip(loads, before, strict=True)], 2),
            interval(p99, 3),
            interval([a / b for a, b in zip(p99, p99_before, strict=True)], 2),
            interval([_figure(one, "mean") for one in runs], 3),
        )
    return table


def _play(args: argparse.Namespace, trace: str, router: str, seed: int) -> dict[str, Any]:
    mooncake = trace == "mooncake"
    workload = WorkloadSpec(
        trace=str(getattr(args, trace)),
        limit=args.limit,
        scale=args.mooncake_scale if mooncake else args.azure_scale,
        adapters=args.adapters,
        popularity="zipf:1.0",
        max_prompt=64_000 if mooncake else None,
    )
    experiment = Experiment(
        workload=workload,
        preset=PRESET,
        slots=8,
        cpu_loras=32,
        max_model_len=70_000 if mooncake else None,
        enable_prefix_caching=mooncake,
        replicas=args.replicas,
        router=router,
        placement=args.placement,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        return run(experiment, Path(folder)).summary


def _figure(summary: dict[str, Any], kind: str) -> float:
    return float(summary["swaps"]["disk_loads"] if kind == "loads" else summary["ttft_seconds"][kind])


def hot(args: argparse.Namespace) -> Table:
    title = f"{args.users} users of one adapter, two replicas"
    table = new_table(title, "router", "requests", "most, in fair shares", "seconds")
    for router in args.routers:
        counts, seconds = run_in_virtual_time(_closed_loop(router, args.users, args.each))
        most = max(counts) / (sum(counts) / len(counts))
        table.add_row(router, " : ".join(map(str, counts)), f"{most:.2f}", f"{seconds:.1f}")
    return table


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("decisions")
    command.add_argument("--routers", nargs="+", default=sorted(routing.available_routers()))
    command.add_argument("--replicas", type=int, default=64)
    command.add_argument("--adapters", type=int, default=10_000)
    command.add_argument("--decisions", type=int, default=4000)
    command.set_defaults(run=decisions)
    command = commands.add_parser("traces")
    command.add_argument("--routers", nargs="+", default=["least_loaded", "affinity"])
    command.add_argument("--placement", default="none")
    command.add_argument("--azure", type=Path, help="AzureLLMInferenceTrace_code.csv")
    command.add_argument("--mooncake", type=Path, help="a Mooncake trace, JSON lines")
    command.add_argument("--azure-scale", type=float, default=4.0)
    command.add_argument("--mooncake-scale", type=float, default=0.8)
    command.add_argument("--replicas", type=int, default=4)
    command.add_argument("--adapters", type=int, default=150)
    command.add_argument("--limit", type=int, default=1500)
    command.add_argument("--seeds", type=int, default=3)
    command.set_defaults(run=traces)
    command = commands.add_parser("hot")
    command.add_argument("--routers", nargs="+", default=["holder", "least_loaded", "affinity"])
    command.add_argument("--users", type=int, default=50)
    command.add_argument("--each", type=int, default=10)
    command.set_defaults(run=hot)
    args = parser.parse_args()
    Console().print(args.run(args))


if __name__ == "__main__":
    main()
