"""Cost of a router's decision."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

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
        fleet.join(f"replica-{index}", routing.ReplicaLimits(8, 64, 500_000))
        held = list(dict.fromkeys(rng.choices(names, weights, k=600)))[:256]
        report = routing.Report(
            sent_at=now,
            received=0,
            ended=0,
            waiting=rng.randrange(5),
            running=rng.randrange(40),
            waiting_tokens=rng.randrange(8000),
            free_kv_tokens=300_000,
            waiting_for=dict.fromkeys(held[100:103], 1),
            load_seconds=0.05,
            slot_seconds=0.004,
            seconds_per_token=2.4e-5,
            tiers=routing.Tiers(held[:8], held[8:]),
        )
        fleet.report(f"replica-{index}", report)
    guard = routing.RouterGuard(routing.load_router(router))
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


CASES = (decisions,)
