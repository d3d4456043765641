"""Runs a workload on an engine, live or simulated, or on a simulated fleet, and records the results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

from aioengine.engine import AsyncEngine
from aioengine.fleet.config import FleetConfig
from aioengine.lab.fleet.conditions import Conditions
from aioengine.lab.fleet.fleet import START_SECONDS, SimulatedFleet
from aioengine.lab.runs.open_loop import OpenLoop, Progress, Replayed
from aioengine.lab.runs.recorder import PolicyWatch, Recorder
from aioengine.lab.runs.rows import Sink
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.prompts import LiveRequests, SimulatedRequests
from aioengine.lab.workload.requests import Workload


class Watching(TypedDict, total=False):
    """How a run is watched."""

    sample_seconds: float
    """Between two samples; ``progress`` is told as often."""
    progress: Progress | None
    total: int | None
    """How many requests there are, for ``progress``."""


async def replay(
    engine: AsyncEngine,
    workload: Workload,
    sink: Sink,
    *,
    paths: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    listener: PolicyWatch | None = None,
    **watching: Unpack[Watching],
) -> Replayed:
    """Send every request at its time, whether or not earlier ones have ended (an open loop), and wait for all
    of them. Only requests that have not ended are in memory.

    Args:
        engine: It must be running; the workload's adapters are registered first.
        paths: Where a live engine finds the adapters, by name; those that are not in it must be
            registered, or found by its resolver.
        seed: For the prompts, which are random tokens on a live engine.
        listener: Called with the engine's events.

    Raises:
        RunStalled: Nothing has moved for ``STALL_SECONDS`` while requests wait, or no request got a token in
            ``MOST_WITHOUT_TOKEN`` steps and moves.
        ConfigError: ``sample_seconds`` is not more than 0.
    """
    of_engine: dict[str, Any]
    if isinstance(engine, SimulatedEngine):
        engine.add_adapters(workload.adapters)
        requests = SimulatedRequests(engine.model_spec.vocab_size)
        of_engine = {"requests": requests, "lengths": engine.lengths}
    else:
        of_engine = {"requests": LiveRequests(engine.model_spec, seed)}
        known = {info.name for info in engine.adapters()}
        for shape in workload.adapters:
            if paths is not None and shape.name in paths and shape.name not in known:
                engine.register_adapter(shape.name, paths[shape.name])

    def state() -> str:
        stats = engine.stats()
        slots = ", ".join(f"{slot.adapter or 'empty'} ({slot.state})" for slot in stats.slots[:8])
        return (
            f"{stats.waiting} requests wait ({stats.waiting_for_adapter} of them for an adapter) and "
            f"{stats.running} run; slots: {slots}{', ...' if len(stats.slots) > 8 else ''}"
        )

    start = asyncio.get_running_loop().time()
    recorder = Recorder(sink, workload, start=start, listener=listener)
    loop = OpenLoop(
        target=engine,
        recorder=recorder,
        workload=workload,
        start=start,
        state=state,
        **of_engine,
        **watching,
    )
    unwatch = recorder.watch(engine)
    try:
        replayed = await loop.send_all()
        loop.close()
    finally:
        unwatch(asyncio.get_running_loop().time())
    return replayed


async def replay_on_fleet(
    workload: Workload,
    sink: Sink,
    *,
    config: FleetConfig,
    make_engine: Callable[[], SimulatedEngine],
    conditions: Conditions | None = None,
    listener: PolicyWatch | None = None,
    **watching: Unpack[Watching],
) -> tuple[Replayed, SimulatedFleet]:
    """Start a fleet, send every request at its time, wait for all of them, and stop the fleet. Returns it,
    too, because it knows what happened.

    Args:
        make_engine: Makes the engine of one replica.
        listener: Called with the events of all replicas' engines.

    Raises what :func:`replay` raises.
    """
    conditions = conditions or Conditions()
    start = asyncio.get_running_loop().time() + START_SECONDS
    first = make_engine()
    slots = 0 if first.config.lora is None else first.config.lora.max_loras
    recorder = Recorder(sink, workload, start=start, slots=slots, delay=conditions.delay, listener=listener)
    async with SimulatedFleet(config, make_engine, conditions, watch=recorder.watch) as fleet:
        fleet.add_adapters(workload.adapters)
        loop = OpenLoop(
            target=fleet,
            recorder=recorder,
            workload=workload,
            requests=SimulatedRequests(first.costs.spec.vocab_size),
            start=start,
            lengths=fleet.lengths,
            **watching,
        )
        replayed = await loop.send_all()
        fleet.check_invariants()
    loop.close()
    return replayed, fleet
