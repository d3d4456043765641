"""A replica that Serve takes out, for fewer replicas or for another in its place, while streams run on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from support.fleet_cases import LIMITS
from support.fleet_process import needs_ray

from aioengine import EngineConfig, SamplingParams
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.wire import Delta
from aioengine.request import RequestOptions

needs_ray()


def call_of(key: int, *tried: str) -> Call:
    call = Call(key, f"r{key}", [5, 6], SamplingParams(seed=1), RequestOptions(), 0.0)
    call.tried = frozenset(tried)
    return call


async def test_it_gets_nothing_new_and_is_left_when_its_last_stream_has_ended() -> None:
    """Serve waits for the channel's end before it ends the replica."""
    members = Members(FleetConfig(engine=EngineConfig(model="tiny"), replicas=2), None, gateway="gateway")
    closed: list[str] = []
    channels: dict[str, Any] = {}
    for name in ("r0", "r1"):
        channel = channels[name] = SimpleNamespace(
            replica=name, calls={}, send=lambda order: None, leaving=False
        )
        channel.close = lambda name=name: closed.append(name)
        members.members[name] = Member(channel, None)  # type: ignore[arg-type]
        members._channels[name] = channel
        members.state.join(name, LIMITS)
    dispatcher = Dispatcher(members)
    streams = [call_of(1, "r1"), call_of(2, "r1")]
    for call in streams:
        await dispatcher.place(call)
        members.on_delta(channels["r0"], call, Delta(call.key, [9]), 1.0)
    members._replicas_are({"r1"})
    new = call_of(3)
    await dispatcher.place(new)
    assert [call.replica for call in (*streams, new)] == ["r0", "r0", "r1"]
    for call in streams:
        assert not closed and "r0" in members.members
        members.on_delta(channels["r0"], call, Delta(call.key, [8], finish="length"), 2.0)
    assert closed == ["r0"] and members.members.keys() == {"r1"}
    assert not members.losses and not dispatcher.migrations
