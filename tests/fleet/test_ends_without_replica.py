"""What a gateway ends or refuses by itself: requests that run nowhere, before their first replica or between
two, and paths that no message can hold."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine
from support.waiting import until

from aioengine.errors import AdapterInvalid, EngineStopped
from aioengine.fleet.config import FleetConfig

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


async def test_a_path_that_messages_cannot_hold_is_refused(
    tiny_text: Tiny, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica could load it, and then could not say what it has."""
    folder = tmp_path / "\udcff"
    shutil.copytree(adapters / "a", folder)
    async with fleet_here(FleetConfig(engine=small_engine(tiny_text)), monkeypatch) as fleet:
        with pytest.raises(AdapterInvalid, match="no UTF-8"):
            await fleet.client.load_adapter("sql", folder)
        assert not fleet.client.adapters() and fleet.client.members.members.keys() == {"r0"}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("end", ["abort", "stop"])
@pytest.mark.slow
async def test_it_ends_at_once(
    end: str, begun: bool, tiny_text: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FleetConfig(engine=small_engine(tiny_text), replicas=1, replica_wait_seconds=1000.0)
    async with fleet_here(config, monkeypatch) as fleet:
        client, members = fleet.client, fleet.client.members
        outputs = client.generate([5, 6, 7], greedy(50), request_id="x")
        if begun:
            monkeypatch.setattr(members, "_reopen", lambda replica: asyncio.sleep(0))
            await anext(outputs)
            channel: Any = members.channel("r0")
            members._lose(channel, "lost", "for this test")
        else:
            await fleet.replicas["r0"].drain()
            await until(lambda: not members.state.view.accepting)
        finished = asyncio.create_task(_last(outputs))
        await asyncio.sleep(0)
        assert client._ids["x"].replica is None
        async with asyncio.timeout(10):
            if end == "abort":
                assert await client.abort("x")
                assert (await finished).finish_reason == "abort"
            else:
                await client.stop()
                with pytest.raises(EngineStopped, match="stopped before"):
                    await finished


async def _last(outputs: Any) -> Any:
    last = None
    async for output in outputs:
        last = output
    return last
