"""The attacks of ``make attack`` on a server with a tiny model: a client that streams beside them notices
nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from attacks.table.__main__ import ATTACKS, KEYS, Attack, row
from attacks.table.target import Target, attacked
from support.engine_fixtures import Tiny

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
SMALL = {"--max-model-len": "500", "--kv-cache-memory": "16MiB", "--dtype": "float32"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target_of(tiny_text: Tiny) -> AsyncIterator[Callable[[Attack], Awaitable[Target]]]:
    """Attacks that need the same of a server share one, which starts with the first of them."""
    servers: dict[tuple[bool, str | None], Target] = {}
    async with contextlib.AsyncExitStack() as stack:

        async def found(attack: Attack) -> Target:
            kind = attack.keys, attack.template
            if kind not in servers:
                flags = KEYS if attack.keys else ()
                tiny = {"model": tiny_text.model, "example": tiny_text.adapters["a"], "changed": SMALL}
                serving = attacked(*flags, template=attack.template, **tiny)  # type: ignore[arg-type]
                servers[kind] = await stack.enter_async_context(serving)
                await servers[kind].ask(structured_outputs={"regex": "warm"})
                assert servers[kind].held.take().frozen > 100_000, "a collection would visit all of them"
            return servers[kind]

        yield found


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_nobody_else_notices(attack: Attack, target_of: Callable[[Attack], Awaitable[Target]]) -> None:
    target = await target_of(attack)
    line, wrong, _ = await row(attack, target)
    print(line)
    assert not wrong
    assert target.served.process.returncode is None, "the server ended"
