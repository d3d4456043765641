"""A replica tells the gateway when an adapter is not there any more that a request was sent for."""

from __future__ import annotations

from typing import Literal

import pytest
from support.fleet_process import needs_ray

from aioengine import EngineConfig, SamplingParams, events
from aioengine.fleet.beliefs import Beliefs
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.outbox import Outbox
from aioengine.fleet.wire import Delta, Frame, decode_frame, encode_frame
from aioengine.request import RequestOptions

needs_ray()


@pytest.mark.parametrize(("location", "told"), [("disk", True), ("loading", False), ("slot", False)])
def test_what_the_gateway_believed(location: Literal["disk", "loading", "slot"], told: bool) -> None:
    beliefs, box = Beliefs(), Outbox()
    beliefs.believed("r", box, 7)
    for request in ("of another gateway", "r", "r"):
        beliefs(
            events.RequestAdded(
                time=0, request_id=request, adapter="sql", prompt_tokens=1, tenant=None, location=location
            )
        )
    assert decode_frame(encode_frame(Frame(box.take()))).deltas == (
        [Delta(7, misrouted=True)] if told else []
    )


def test_a_request_that_never_arrives_is_forgotten() -> None:
    beliefs, box = Beliefs(), Outbox()
    beliefs.believed("r", box, 7)
    beliefs.forget("r")
    beliefs(
        events.RequestAdded(
            time=0, request_id="r", adapter="sql", prompt_tokens=1, tenant=None, location="disk"
        )
    )
    assert box.take() == []


async def test_it_says_nothing_else_of_the_request() -> None:
    """Its reader is not woken, and what was cached for it is what the next report says."""
    members = Members(FleetConfig(engine=EngineConfig(model="tiny")), None, gateway="gateway")
    dispatcher = Dispatcher(members)
    call = Call(1, "r", [5, 6], SamplingParams(seed=1), RequestOptions(adapter="sql"), 0.0)
    for delta in (Delta(1, misrouted=True), Delta(1, [9], cached_tokens=2)):
        members.on_delta(None, call, delta, 1.0)  # type: ignore[arg-type]
    output = await call.next()
    assert (output.token_ids_delta, output.cached_tokens, dispatcher.misroutes) == ([9], 2, 1)
