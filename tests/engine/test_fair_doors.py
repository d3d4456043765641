"""A tenant with one request is served at once while another floods the engine: with a real model."""

from __future__ import annotations

import asyncio

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy

from aioengine import events
from aioengine.schedulers import load_policy


@pytest.mark.parametrize(("count", "unique"), [(900, False), (5000, True)])
@pytest.mark.slow
async def test_a_flood_of_one_tenant_holds_up_no_other(
    tiny: Tiny, make_engine: MakeEngine, count: int, unique: bool
) -> None:
    path = tiny.adapters["rank-3"]
    async with make_engine(tiny, load_policy("fair"), max_num_seqs=4) as engine:
        steps = 0

        def count_steps(event: events.Event) -> None:
            nonlocal steps
            steps += isinstance(event, events.StepFinished)

        engine.add_listener(count_steps)
        engine.register_adapter("mine", path)
        for i in range(count if unique else 0):
            engine.register_adapter(f"a{i}", path)
        flood = [
            asyncio.create_task(
                engine.complete([i % 20 + 3], greedy(100), adapter=f"a{i}" if unique else None, tenant="a")
            )
            for i in range(count)
        ]
        try:
            while engine.stats().running < 2:
                await asyncio.sleep(0.001)
            for i in range(3):
                before = steps
                async with asyncio.timeout(60):
                    out = await engine.complete([i + 3, 5], greedy(10), adapter="mine", tenant="b")
                assert out.token_ids == tiny.expected([i + 3, 5], 10, "rank-3"), "preemption changes no token"
                # Ten steps of its own; at first others decode on while its adapter is read. All requests of a
                # before it would take thousands.
                assert steps - before <= (300 if i == 0 else 30)
            assert engine.stats().waiting > count // 2, "the case is none: there was no flood"
        finally:
            for task in flood:
                task.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
        engine.check_invariants()
