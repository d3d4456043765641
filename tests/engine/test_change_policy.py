"""Another policy takes over while requests run and wait."""

from __future__ import annotations

import asyncio

import pytest
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, prompt_of, register
from support.waiting import until

from aioengine import events
from aioengine.errors import PolicyError
from aioengine.schedulers import available_policies


@pytest.mark.slow
async def test_any_policy_after_any_other(tiny: Tiny, make_engine: MakeEngine) -> None:
    """None of them minds that it has not seen the beginning, and no token is another."""
    names = ("rank-3", "rank-4", "qv-only")
    async with make_engine(tiny, max_loras=2) as engine:
        wrong: list[events.Event] = []
        engine.add_listener(wrong.append, events.PolicyFailed)
        register(engine, tiny, *names)
        asked = [(prompt_of(i, 5), names[i % 3]) for i in range(6)]
        for policy in sorted(set(available_policies()) - {"oracle"}):  # they know what is to come
            running = asyncio.create_task(check_tokens(engine, tiny, asked, 8))
            await until(lambda: engine.stats().running > 0)
            engine.change_settings(policy=policy)
            assert engine.config.policy == policy
            await running
        assert wrong == []


async def test_one_that_there_is_not_changes_nothing(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        before = engine.config.policy
        with pytest.raises(PolicyError, match="fcsf"):
            engine.change_settings(policy="fcsf")
        assert engine.config.policy == before
