"""The attacks of ``make attack`` on a server with a tiny model: a client that streams beside them notices
nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from attacks.table.__main__ import ATTACKS, KEYS, Attack, row
from attacks.table.target import Target, attacked
from support.engine_fixtures import Tiny

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
SMALL = {"--max-model-len": "500", "--kv-cache-memory": "16MiB", "--dtype": "float32"}


def kind_of(attack: Attack) -> tuple[bool, str | None]:
    """What the server has to have: attacks that need the same share one."""
    return attack.keys, attack.template


KINDS = list(dict.fromkeys(map(kind_of, ATTACKS)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(request: pytest.FixtureRequest, tiny_text: Tiny) -> AsyncIterator[Target]:
    keys, template = request.param
    flags = KEYS if keys else ()
    tiny = {"model": tiny_text.model, "example": tiny_text.adapters["a"], "changed": SMALL}
    async with attacked(*flags, template=template, **tiny) as found:  # type: ignore[arg-type]
        await found.ask(structured_outputs={"regex": "warm"})
        yield found


@pytest.mark.parametrize(
    ("target", "attack"),
    [
        pytest.param(kind, attack, id=attack.name)
        for kind in KINDS
        for attack in ATTACKS
        if kind_of(attack) == kind
    ],
    indirect=["target"],
)
async def test_nobody_else_notices(target: Target, attack: Attack) -> None:
    line, wrong, _ = await row(attack, target)
    print(line)
    assert not wrong
    assert target.served.process.returncode is None, "the server ended"
