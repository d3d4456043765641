"""Cost of metrics in each step, beside it, and at each scrape, by number of adapters and requests.

The step loop waits for the time "in the step"; the time "beside it" is spent on the event loop while the
model computes.

    python -m benchmarks.server.metrics_cost [--adapters 1000] [--running 256] [--slots 32] [--labels 100]

Prints the best and the median of many repetitions; asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

from prometheus_client import generate_latest

from aioengine import events
from aioengine.info import AdapterInfo, EngineStats, SlotInfo
from aioengine.metrics import EngineMetrics


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--labels", type=int, default=100)
    args = parser.parse_args()
    names = [f"adapter-{index:04d}" for index in range(args.adapters)]
    metrics = prepared(names, args.slots, args.running, args.labels)

    print(f"{args.adapters} adapters, {args.slots} slots, {args.running} running, {args.labels} labels")
    for turnover in (0, 1, 8):
        inside, beside = await step_cost(metrics, names[: args.slots], args.running, turnover)
        report(f"in the step: its events, {turnover} requests come and go", inside)
        report("  beside it", beside)
    series = len(metrics.expose()[0].splitlines())
    report(f"scrape: on the event loop ({series} lines)", timed(metrics.families, 30))
    report("scrape: in all, expose()", timed(metrics.expose, 30))
    report("scrape: OpenMetrics", timed(lambda: metrics.expose("application/openmetrics-text"), 30))
    report(
        "for comparison: prometheus_client on .registry", timed(lambda: generate_latest(metrics.registry), 10)
    )


def prepared(names: list[str], slots: int, running: int, labels: int) -> EngineMetrics:
    """Make metrics with a history for every adapter; the snapshot is rebuilt at each scrape."""

    def snapshot() -> EngineStats:
        fields = {name: 1 for name in EngineStats.__struct_fields__ if name != "slots"}
        held = [
            SlotInfo(index=i, state="READY", adapter=names[i], version=1, running=1, pinned=False)
            for i in range(slots)
        ]
        return EngineStats(slots=tuple(held), **{**fields, "running": running})

    def adapters() -> list[AdapterInfo]:
        return [info(name, index) for index, name in enumerate(names)]

    def info(name: str, index: int) -> AdapterInfo:
        return AdapterInfo(
            name=name,
            version=1,
            path="/adapters",
            rank=16,
            bytes=1,
            location="slot" if index < slots else "cpu" if index < 4 * slots else "disk",
            slot=index if index < slots else None,
            pinned=False,
            running=0,
            waiting=0,
        )

    metrics = EngineMetrics(labels, snapshot, adapters)
    for index, name in enumerate(names):
        path = f"/adapters/{name}"
        metrics.handle(events.AdapterRegistered(time=0.0, adapter=name, version=1, path=path, replaces=None))
        if index < slots:
            metrics.handle(placed(name, index))
        for event in (*come(name, f"first-{index}"), *go(name, f"first-{index}")):
            metrics.handle(event)
        interval = events.TokenInterval(name, 0.02, 1)
        metrics.handle(step([interval], slots=(), sequences=1))
    return metrics


def placed(name: str, slot: int) -> events.Event:
    return events.AdapterPlaced(
        time=0.0, adapter=name, version=1, slot=slot, rank=16, nbytes=1, seconds=0.001
    )


def come(name: str, request_id: str) -> list[events.Event]:
    return [
        events.RequestAdded(
            time=0.0, request_id=request_id, adapter=name, prompt_tokens=8, tenant=None, location="slot"
        ),
        events.RequestAdmitted(
            time=0.1,
            request_id=request_id,
            adapter=name,
            slot=0,
            cached_tokens=0,
            queue_seconds=0.1,
            resumed=False,
        ),
        events.FirstToken(time=0.2, request_id=request_id, adapter=name, seconds=0.2),
    ]


def go(name: str, request_id: str) -> list[events.Event]:
    return [
        events.RequestEnded(
            time=1.0,
            request_id=request_id,
            adapter=name,
            reason="stop",
            error=None,
            prompt_tokens=8,
            output_tokens=8,
            seconds=1.0,
            tenant=None,
        )
    ]


def step(
    intervals: list[events.TokenInterval], *, slots: tuple[int, ...], sequences: int
) -> events.StepFinished:
    return events.StepFinished(
        time=1.0,
        step=1,
        seconds=0.02,
        schedule_seconds=0.0002,
        policy_seconds=0.0001,
        sequences=sequences,
        adapters=len(slots),
        prefill_tokens=0,
        decode_tokens=sequences,
        slots=slots,
        intervals=tuple(intervals),
    )


async def step_cost(
    metrics: EngineMetrics, names: list[str], running: int, turnover: int
) -> tuple[list[float], list[float]]:
    """Return the seconds in ``handle`` for all events of a step in which every running request gets a token,
    and the seconds until they are counted."""
    share = running // len(names)
    intervals = [events.TokenInterval(name, 0.02, share) for name in names]
    happened: list[events.Event] = []
    for index in range(turnover):
        name = names[index % len(names)]
        happened += [*come(name, f"r{index}"), *go(name, f"r{index}")]
    happened.append(step(intervals, slots=tuple(range(len(names))), sequences=running))

    inside, beside = [], []
    for _ in range(500):
        start = time.perf_counter()
        for event in happened:
            metrics.handle(event)
        handled = time.perf_counter()
        await asyncio.sleep(0)
        inside.append(handled - start)
        beside.append(time.perf_counter() - handled)
    return inside, beside


def timed(function: Callable[[], object], repetitions: int) -> list[float]:
    function()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def report(what: str, seconds: list[float]) -> None:
    best, median = min(seconds) * 1e6, statistics.median(seconds) * 1e6
    print(f"{what:<55} best {best:>9.1f} us, median {median:>9.1f} us")


if __name__ == "__main__":
    asyncio.run(main())
