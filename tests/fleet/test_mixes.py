"""Mixes, scales, versions and uploads in a fleet: what one engine does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import FleetHere, fleet_here, small_engine
from support.mixed_adapters import generated, scaled_model

from aioengine.errors import AdapterChanged, AdapterNotFound, ConfigError
from aioengine.fleet.config import FleetConfig

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

PROMPT = [5, 6, 7, 8]
MIXES: list[dict[str, float]] = [{"a": 0.7, "b": 0.4}, {"a": 0.5}, {"b": -1.5}]


def config_of(tiny: Tiny, **fields: object) -> FleetConfig:
    engine = small_engine(tiny, max_num_seqs=2)
    return FleetConfig(engine=engine, **{"replicas": 2, **fields})  # type: ignore[arg-type]


@pytest.fixture
async def fleet(
    tiny_text: Tiny, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FleetHere]:
    config = config_of(tiny_text, adapters={"a": str(adapters / "a")}, registry=str(tmp_path / "registry"))
    async with fleet_here(config, monkeypatch) as found:
        await found.client.load_adapter("b", str(adapters / "b"))
        yield found


def of_peft(tiny: Tiny, adapters: Path, mix: dict[str, float], count: int = 6) -> list[int]:
    weights = {adapters / name: weight for name, weight in mix.items()}
    return generated(scaled_model(tiny.model, weights), PROMPT, count)


async def complete(fleet: FleetHere, adapter: str | dict[str, float] | None) -> list[int]:
    found: list[int] = (await fleet.client.complete(PROMPT, greedy(6), adapter=adapter)).token_ids
    return found


@pytest.mark.slow
async def test_mixes_and_scales(fleet: FleetHere, tiny_text: Tiny, adapters: Path) -> None:
    for mix in MIXES:
        expected = of_peft(tiny_text, adapters, mix)
        for _ in range(3):
            output = await fleet.client.complete(PROMPT, greedy(6), adapter=mix)
            assert output.token_ids == expected
            assert output.adapter == "+".join(f"{name}*{weight}" for name, weight in mix.items())
    held = [{info.name for info in replica.engine.resident()} for replica in fleet.replicas.values()]
    assert not {name for name in held[0] & held[1] if "*" in name}, "each was asked for where it is"
    assert {info.name for info in fleet.client.adapters()} == {"a", "b"}
    assert await complete(fleet, {"b": 1.0}) == of_peft(tiny_text, adapters, {"b": 1.0})
    assert await complete(fleet, {"a": 0.5, "b@1": 0.25}) == of_peft(
        tiny_text, adapters, {"a": 0.5, "b": 0.25}
    )
    scraped = fleet.client.metrics.expose("", "door")[0].decode()
    assert 'adapter="b"' in scraped and "*" not in scraped, "clients make up the names of mixes"
    with pytest.raises(AdapterNotFound, match="nobody"):
        await complete(fleet, {"a": 0.5, "nobody": 0.5})


@pytest.mark.slow
async def test_versions(fleet: FleetHere, tiny_text: Tiny, adapters: Path) -> None:
    """A replaced version lives where requests still wait for it, and only there."""
    of_a, of_b = (of_peft(tiny_text, adapters, {name: 1.0}) for name in "ab")
    client = fleet.client
    for name in ("a", "a@1"):
        assert await complete(fleet, name) == of_a
    old = (await client.load_adapter("x", str(adapters / "a"))).digest
    runs = [asyncio.create_task(client.complete(PROMPT, greedy(50), adapter="x@1")) for _ in range(60)]
    members = client.members.members.values()
    while not any(member.has("x", old) for member in members) or not any(
        r.engine.stats().waiting for r in fleet.replicas.values()
    ):
        await asyncio.sleep(0)
    info = await client.load_adapter("x", str(adapters / "b"), replace=True)
    assert info.version == 2
    early, late, mixed = await asyncio.gather(
        complete(fleet, "x@1"), complete(fleet, "x"), complete(fleet, {"x@1": 0.5})
    )
    assert (early, late) == (of_a, of_b)
    assert mixed == of_peft(tiny_text, adapters, {"a": 0.5})
    await asyncio.gather(*runs)
    while any(member.has("x", old) for member in members):
        await asyncio.sleep(0.01)
    for gone in ("x@1", "x@3", "y@1"):
        with pytest.raises(AdapterNotFound):
            await complete(fleet, gone)
    assert await complete(fleet, "x@2") == of_b


async def test_no_part_of_a_mix_has_changed_files(fleet: FleetHere, tmp_path: Path, adapters: Path) -> None:
    """A replica takes no other content of a part than the fleet knows; one that has read that keeps it."""
    folder = tmp_path / "c"
    folder.mkdir()
    for file in os.listdir(adapters / "a"):
        (folder / file).write_bytes((adapters / "a" / file).read_bytes())
    await fleet.client.load_adapter("c", str(folder))
    name = "adapter_model.safetensors"
    (folder / f"{name}.new").write_bytes((adapters / "b" / name).read_bytes())
    (folder / f"{name}.new").rename(folder / name)
    found = []
    for replica in fleet.replicas.values():
        held = any(info.name == "c" for info in replica.engine.resident())
        with nullcontext() if held else pytest.raises(AdapterChanged, match="have changed"):
            await replica.engine.complete(PROMPT, greedy(1), adapter={"c": 0.5})
        found.append(held)
    assert not all(found)


async def test_uploads_need_a_registry(tiny_text: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet_here(config_of(tiny_text, replicas=1), monkeypatch) as found:
        with pytest.raises(ConfigError, match="set registry"):
            await found.client.load_adapter_files("sent", b"{}", b"")
