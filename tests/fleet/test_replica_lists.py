"""What a gateway makes of Serve's lists of replicas: who is in one, who is not any more, and who comes
back."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.reporting_replicas import NAMES, Replicas, gateway_of

from aioengine import SamplingParams
from aioengine.fleet.gateway.call import Call
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.request import RequestOptions


def _call(key: int) -> Call:
    return Call(key, f"r{key}", [5, 6], SamplingParams(seed=1), RequestOptions(), 0.0)


lists = st.sets(st.sampled_from(NAMES))


@settings(max_examples=60)
@given(steps=st.lists(st.tuples(lists, st.floats(0.0, 3.0), st.sampled_from(NAMES)), max_size=8), last=lists)
@example(steps=[({"r0", "r1"}, 1.0, "r1"), ({"r0"}, 1.0, "r0")], last={"r0", "r1"})
def test_who_is_in_the_last_list_gets_requests(
    steps: list[tuple[set[str], float, str]], last: set[str]
) -> None:
    """Whatever the lists before, and although requests run there, or have ended meanwhile. ``steps``: a list,
    the seconds until the next one, and a replica that gets a request then, or whose request ends."""

    async def main() -> None:
        async with gateway_of(Replicas()) as members:

            def end(replica: str) -> None:
                channel = members.channel(replica)
                if channel is not None and channel.calls:
                    channel.calls.clear()
                    members.close_if_left(channel)

            for number, (there, seconds, replica) in enumerate(steps):
                members._replicas_are(set(there))
                await asyncio.sleep(seconds)
                accepting = {view.replica_id for view in members.state.view.accepting}
                assert accepting <= there
                channel = members.channel(replica)
                if channel is not None and not channel.calls and replica in accepting:
                    channel.calls[number] = _call(number)
                else:
                    end(replica)
            members._replicas_are(set(last))
            await asyncio.sleep(3.0)
            assert {view.replica_id for view in members.state.view.accepting} == last
            for replica in NAMES:
                end(replica)
            assert members.members.keys() == last and not members.losses

    run_in_virtual_time(main())


def test_a_replica_that_dies_is_one_loss(caplog: pytest.LogCaptureFixture) -> None:
    """Serve lists it for some seconds afterwards, and the gateway tries it again meanwhile."""
    caplog.set_level(logging.WARNING, "aioengine.fleet")

    async def main() -> None:
        replicas = Replicas(dies={"r1": 5.0})
        async with gateway_of(replicas) as members:
            await asyncio.sleep(15.0)
            assert replicas.opened.count("r1") > 5
            assert members.losses == {"lost": 1}
            assert sum("r1" in record.getMessage() for record in caplog.records) == 1

    run_in_virtual_time(main())
