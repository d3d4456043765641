"""What the HTTP server and its metrics cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial

from prometheus_client import generate_latest

from aioengine import events
from aioengine.info import AdapterInfo, EngineStats, SlotInfo
from aioengine.metrics import EngineMetrics
from benchmarks.fleet.servers import served, throughput
from benchmarks.runner import Calls
from benchmarks.shared.engines import (
    OUTPUT,
    PROMPT,
    configuration,
    random_adapters,
    random_prompts,
    run_once,
    started,
)


async def serving(
    *, model: str = "smollm2-135m", streams: int = 64, adapters: int = 8, rounds: int = 3
) -> AsyncGenerator[Calls, None]:
    """The same load streamed through ``aioengine serve`` and on an embedded engine, one thread each.

    The client runs in this process, and takes processor time from the model where cores are few.
    """
    prompts = random_prompts(21_000, streams, PROMPT)
    with random_adapters(model, adapters) as paths:
        flags = ["--max-loras", str(adapters), "--max-num-seqs", str(streams), "--lora-modules"]
        flags += [f"{name}={path}" for name, path in paths.items()]
        config = configuration(model, slots=adapters, max_num_seqs=streams)
        with served(model, *flags) as server:
            async with started({0: config}, paths) as engines:

                async def embedded() -> dict[str, float]:
                    began = time.thread_time()
                    rate, _ = await run_once(engines[0], prompts, OUTPUT, list(paths))
                    own = 1e6 * (time.thread_time() - began) / (streams * OUTPUT)
                    return {"output tok/s": rate, "event loop, us/token": own}

                calls = {
                    "embedded": embedded,
                    "served": partial(throughput, server, streams, OUTPUT, tuple(paths)),
                }
                yield Calls(f"{streams} streams over {adapters} adapters", calls, rounds)


async def metrics(
    *, adapters: int = 1000, running: int = 256, slots: int = 32, labels: int = 100, rounds: int = 50
) -> AsyncGenerator[Calls, None]:
    """Metrics in each step, beside it, and at each scrape.

    The step loop waits for the time "in the step"; "beside it" is spent while the model computes.
    """
    names = [f"adapter-{index:04d}" for index in range(adapters)]
    made = prepared(names, slots, running, labels)
    intervals = [events.TokenInterval(name, 0.02, running // slots) for name in names[:slots]]

    async def step(turnover: int) -> dict[str, float]:
        happened: list[events.Event] = []
        for index in range(turnover):
            happened += lifetime(names[index % slots], f"r{index}")
        happened.append(finished(intervals, slots, running))
        start = time.perf_counter()
        for event in happened:
            made.handle(event)
        handled = time.perf_counter()
        await asyncio.sleep(0)
        return {
            "in the step, us": 1e6 * (handled - start),
            "beside it, us": 1e6 * (time.perf_counter() - handled),
        }

    title = f"{adapters:,} adapters, {slots} slots, {running} running, {labels} labels"
    steps = {f"{turnover} requests come and go": partial(step, turnover) for turnover in (0, 1, 8)}
    yield Calls(f"A step: {title}", steps, 10 * rounds)

    def silent(work: object) -> None:
        """Forget what a call returns, which is no figure."""

    scrapes = {
        "on the event loop": lambda: silent(made.families()),
        "in all": lambda: silent(made.expose()),
        "OpenMetrics": lambda: silent(made.expose("application/openmetrics-text")),
        "prometheus_client": lambda: silent(generate_latest(made.registry)),
    }
    yield Calls(f"A scrape of {len(made.expose()[0].splitlines()):,} lines", scrapes, rounds)


def prepared(names: list[str], slots: int, running: int, labels: int) -> EngineMetrics:
    """Make metrics with a history for every adapter."""

    def snapshot() -> EngineStats:
        fields = {name: 1 for name in EngineStats.__struct_fields__ if name != "slots"}
        held = [
            SlotInfo(index=i, state="READY", adapter=names[i], version=1, running=1, pinned=False)
            for i in range(slots)
        ]
        return EngineStats(slots=tuple(held), **{**fields, "running": running})

    def adapters() -> list[AdapterInfo]:
        return [
            AdapterInfo(
                name=name, version=1, path="/adapters", rank=16, bytes=1, pinned=False, running=0, waiting=0,
                location="slot" if i < slots else "cpu" if i < 4 * slots else "disk", slot=i if i < slots
                else None,
            )
            for i, name in enumerate(names)
        ]  # fmt: skip

    metrics = EngineMetrics(labels, snapshot, adapters)
    for index, name in enumerate(names):
        known = {"time": 0.0, "adapter": name, "version": 1}
        metrics.handle(events.AdapterRegistered(**known, path=f"/adapters/{name}", replaces=None))
        if index < slots:
            metrics.handle(events.AdapterPlaced(**known, slot=index, rank=16, nbytes=1, seconds=0.001))
        for event in lifetime(name, f"first-{index}"):
            metrics.handle(event)
        metrics.handle(finished([events.TokenInterval(name, 0.02, 1)], 0, 1))
    return metrics


def lifetime(name: str, request_id: str) -> list[events.Event]:
    """Return the events of a request."""
    known = {"request_id": request_id, "adapter": name}
    return [
        events.RequestAdded(time=0.0, **known, prompt_tokens=8, tenant=None, location="slot"),
        events.RequestAdmitted(
            time=0.1, **known, slot=0, cached_tokens=0, queue_seconds=0.1, resumed=False
        ),
        events.FirstToken(time=0.2, **known, seconds=0.2),
        events.RequestEnded(
            time=1.0, **known, reason="stop", error=None, prompt_tokens=8, output_tokens=8, seconds=1.0,
            tenant=None
        ),
    ]  # fmt: skip


def finished(intervals: list[events.TokenInterval], slots: int, sequences: int) -> events.StepFinished:
    """Return the event of a step in which every sequence gets a token."""
    return events.StepFinished(
        time=1.0, step=1, seconds=0.02, schedule_seconds=0.0002, policy_seconds=0.0001, sequences=sequences,
        adapters=slots, prefill_tokens=0, decode_tokens=sequences, slots=tuple(range(slots)),
        intervals=tuple(intervals),
    )  # fmt: skip


CASES = (serving, metrics)
