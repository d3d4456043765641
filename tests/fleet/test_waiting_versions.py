"""Replaced versions that requests still wait for, and that nobody has read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here
from support.held_steps import HeldStep
from support.waiting import until

from aioengine import EngineConfig, LoRAConfig
from aioengine.errors import AdapterNotFound
from aioengine.fleet.config import FleetConfig

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

PROMPT = [5, 6, 7, 8]


@pytest.mark.slow
async def test_a_version_that_waits_on_disk_is_read_for_those_that_wait(
    tiny_text: Tiny, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica has room for one adapter, and it is in use; requests wait for another one, which is then
    replaced, and was never read there."""
    engine = EngineConfig(
        model=str(tiny_text.model),
        dtype="float32",
        max_model_len=64,
        kv_cache_memory="4MiB",
        lora=LoRAConfig(max_loras=1, max_cpu_loras=1),
    )
    named = {"busy": str(adapters / "b"), "sql": str(adapters / "a")}
    config = FleetConfig(engine=engine, replicas=2, adapters=named)
    async with fleet_here(config, monkeypatch) as fleet:
        client, there = fleet.client, fleet.replicas["r1"].engine
        held = HeldStep()
        params = msgspec.structs.replace(greedy(3), constraint=held)
        works = [asyncio.create_task(there.complete(PROMPT, params, adapter="busy"))]
        await until(held.begun.is_set)
        works.append(asyncio.create_task(there.complete(PROMPT, greedy(6), adapter="sql")))
        member = client.members.members["r1"]
        await until(lambda: member.status is not None and member.status.report.waiting > 0)
        # It is read by the other one, because that is idle.
        info = await client.load_adapter("sql", str(adapters / "b"), replace=True)
        assert info.version == 2
        assert {i.version: i.location for i in there.replaced()} == {1: "disk"}
        with pytest.raises(AdapterNotFound, match="gone"):
            await client.complete(PROMPT, greedy(6), adapter="sql@1")  # nobody knows what it is
        late = await client.complete(PROMPT, greedy(6), adapter="sql")
        held.go_on.set()
        _, before = await asyncio.gather(*works)
        assert before.token_ids == tiny_text.expected(PROMPT, 6, "a") != late.token_ids
