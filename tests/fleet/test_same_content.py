"""Requests that have begun go on only with the content that they began with, whatever is in the files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine

from aioengine import LoRAConfig
from aioengine.errors import AdapterChanged, AioEngineError
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.channel import Channel
from aioengine.request import RequestOptions, Wanted

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

PROMPT = [5, 6, 7, 8]
WANTED: list[tuple[bool, Wanted]] = [
    *((False, wanted) for wanted in ("x", {"x": 0.5}, {"b": 0.25, "x": 0.5})),
    (True, "x"),
]
"""Whether the adapter is in the configuration, or found by its name; and what a request wants."""


@pytest.mark.parametrize(("named", "wanted"), WANTED, ids=str)
@pytest.mark.parametrize("loaded", [False, True], ids=["", "then loaded"])
@pytest.mark.parametrize("changed", [False, True], ids=["the same", "changed"])
@pytest.mark.slow
async def test_another_replica_finds_other_content(
    named: bool,
    changed: bool,
    loaded: bool,
    wanted: Wanted,
    tiny_text: Tiny,
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request has begun on one replica. The other one has not read the adapter yet, and its files change;
    then it may be loaded through the fleet, which gives it a number."""
    for name, source in (("x", "a"), ("b", "b")):
        shutil.copytree(adapters / source, tmp_path / name)
    lora = LoRAConfig(max_loras=2, max_cpu_loras=4, adapter_root=None if named else str(tmp_path))
    paths = {name: str(tmp_path / name) for name in "bx"} if named else {}
    config = FleetConfig(engine=small_engine(tiny_text, lora=lora), replicas=2, adapters=paths)
    async with fleet_here(config, monkeypatch) as fleet:
        client, first = fleet.client, fleet.replicas["r0"].engine
        member = client.members.members["r1"]
        member.ready = False
        client.members.state.drain("r1")
        expected = await first.complete(PROMPT, greedy(12), adapter=wanted)
        take = client.members.on_delta

        def only_of_r1(channel: Channel, *rest: Any) -> None:
            if channel.replica == "r1":
                take(channel, *rest)

        tokens: list[int] = []
        failed: AioEngineError | None = None
        try:
            async for output in client.generate(PROMPT, greedy(12), adapter=wanted):
                tokens += output.token_ids_delta
                assert output.adapter_digest == expected.adapter_digest
                channel = client.members.channel("r0")
                if channel is None:
                    continue
                assert len(tokens) < 12 and channel.calls
                client.members.on_delta = only_of_r1  # what r0 still says does not arrive
                if changed:
                    shutil.rmtree(tmp_path / "x")
                    shutil.copytree(adapters / "b", tmp_path / "x")
                if loaded:
                    await client.load_adapter("x")
                member.ready = True
                client.members.state.drain("r1", False)
                client.members._lose(channel, "lost", "for this test")
        except AdapterChanged as error:
            failed = error
        assert tokens == expected.token_ids[: len(tokens)]
        assert (failed is not None) == changed == (len(tokens) < 12)


NAMES = st.text("ab-@+", min_size=1, max_size=3).filter(lambda name: "@" not in name)


@given(st.sets(NAMES, min_size=2, max_size=5), st.data())
def test_the_order_of_a_mix_is_that_of_its_names(names: set[str], data: st.DataObject) -> None:
    """With versions or without: so the sum has the same bits on every replica."""
    numbers = st.sampled_from(["", "@1", "@10"])
    mixes = [{name + data.draw(numbers): 0.5 for name in names} for _ in range(2)]
    orders = [[name.partition("@")[0] for name in RequestOptions(adapter=mix).named] for mix in mixes]
    assert orders[0] == orders[1] == sorted(names)
