"""A replica tells the door when an adapter is not there any more that a request was sent for."""

from __future__ import annotations

from typing import Literal

import pytest
from support.fleet_process import needs_ray

from aioengine import events
from aioengine.fleet.beliefs import Beliefs
from aioengine.fleet.outbox import Outbox
from aioengine.fleet.wire import Delta, Frame, decode_frame, encode_frame

needs_ray()


@pytest.mark.parametrize(("location", "told"), [("disk", True), ("loading", False), ("slot", False)])
def test_what_the_door_believed(location: Literal["disk", "loading", "slot"], told: bool) -> None:
    beliefs, box = Beliefs(), Outbox()
    beliefs.believed("r", box, 7)
    for request in ("of another door", "r", "r"):
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
