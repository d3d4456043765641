"""A policy in the engine's own loop, on an idle engine: is it asked again when nothing wakes it?"""

from __future__ import annotations

import asyncio

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.policy_check.world import NeverEnds
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.request import SamplingParams
from aioengine.schedulers import SchedulerPolicy

PRESET = "smollm2-135m-cpu"
REQUESTS = 6
MOST_SECONDS = 600.0
"""Simulated seconds in which a request that is alone on the engine must end."""


def serve_one_by_one(policy: SchedulerPolicy) -> None:
    """Serve requests that come one by one, each for a cold adapter, on a simulated engine that is idle
    otherwise. Raises NeverEnds if one of them is not served."""
    run_in_virtual_time(_serve(policy))


async def _serve(policy: SchedulerPolicy) -> None:
    lora = LoRAConfig(max_loras=1, max_cpu_loras=2)
    config = EngineConfig(model=PRESET, max_model_len=256, kv_cache_memory="64MiB", lora=lora)
    shapes = [AdapterShape(f"adapter-{index}", 8, None) for index in range(REQUESTS // 2)]
    async with SimulatedEngine(config, load_costs(PRESET), policy, metrics=False) as engine:
        engine.add_adapters(shapes)
        for index in range(REQUESTS):
            name = shapes[index % len(shapes)].name
            try:
                async with asyncio.timeout(MOST_SECONDS):
                    await engine.complete([0] * 8, SamplingParams(max_tokens=4), adapter=name)
            except TimeoutError:
                raise NeverEnds(
                    f"a request for {name}, alone on the engine, was not served in {MOST_SECONDS:g} s"
                ) from None
