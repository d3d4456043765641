"""Another policy takes over while requests run and wait."""

from __future__ import annotations

import asyncio

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of

from aioengine import events
from aioengine.errors import PolicyError
from aioengine.schedulers import available_policies


@pytest.mark.slow
async def test_any_policy_after_any_other(tiny: Tiny, make_engine: MakeEngine) -> None:
    """None of them minds that it has not seen the beginning, and no token is another."""
    names = ("rank-3", "rank-4", "qv-only")
    async with make_engine(tiny, max_loras=2) as engine:
        wrong: list[events.Event] = []
        engine.add_listener(
            lambda event: wrong.append(event) if isinstance(event, events.PolicyFailed) else None
        )
        for name in names:
            engine.register_adapter(name, tiny.adapters[name])
        for policy in sorted(set(available_policies()) - {"oracle"}):  # they know what is to come
            running = [
                asyncio.create_task(engine.complete(prompt_of(i, 5), greedy(8), adapter=names[i % 3]))
                for i in range(6)
            ]
            await asyncio.sleep(0)
            engine.change_settings(policy=policy)
            assert engine.config.policy == policy
            for i, task in enumerate(running):
                expected = tiny.expected(prompt_of(i, 5), 8, names[i % 3])
                assert (await task).token_ids == expected, policy
        assert wrong == []


async def test_one_that_there_is_not_changes_nothing(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        before = engine.config.policy
        with pytest.raises(PolicyError, match="fcsf"):
            engine.change_settings(policy="fcsf")
        assert engine.config.policy == before
