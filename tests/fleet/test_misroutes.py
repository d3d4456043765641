"""A replica tells the gateway when an adapter is not there any more that a request was sent for."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine

from aioengine import EngineConfig, SamplingParams
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.outbox import Outbox
from aioengine.fleet.wire import Delta, Submit
from aioengine.request import RequestOptions, pack_params

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


async def test_what_the_gateway_believed(
    tiny_text: Tiny, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica has the adapter on disk alone; afterwards it has it in memory."""
    config = FleetConfig(engine=small_engine(tiny_text), adapters={"sql": str(adapters / "a")})
    async with fleet_here(config, monkeypatch) as fleet:
        replica, order = fleet.replicas["r0"], RequestOptions(adapter="sql")
        for key, told in ((1, [True, False]), (2, [False])):
            box = Outbox()
            submit = Submit(key, f"r{key}", [5], pack_params(greedy(1)), order, believed=True, contents=[""])
            await replica._generate(box, submit)
            assert [delta.misrouted for delta in box.take()] == told


async def test_it_says_nothing_else_of_the_request() -> None:
    """Its reader is not woken, and what was cached for it is what the next report says."""
    members = Members(FleetConfig(engine=EngineConfig(model="tiny")), None, gateway="gateway")
    dispatcher = Dispatcher(members)
    call = Call(1, "r", [5, 6], SamplingParams(seed=1), RequestOptions(adapter="sql"), 0.0)
    for delta in (Delta(1, misrouted=True), Delta(1, [9], cached_tokens=2)):
        members.on_delta(None, call, delta, 1.0)  # type: ignore[arg-type]
    output = await call.next()
    assert (output.token_ids_delta, output.cached_tokens, dispatcher.misroutes) == ([9], 2, 1)
