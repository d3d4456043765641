"""Gateways and replicas that are stopped for a while, as by a debugger or a full disk; in virtual time."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.reporting_replicas import CONFIG, NAMES, Replicas, gateway_of

from aioengine.fleet.gateway.members import ARRIVE_SECONDS
from aioengine.fleet.wire import Submit
from aioengine.lab.simulation.clock import VirtualTimeLoop, run_in_virtual_time
from aioengine.request import RequestOptions

NEVER = 1e6


def _submit(key: int) -> Submit:
    return Submit(key, f"request-{key}", [1], {}, RequestOptions())


@settings(max_examples=30)
@given(
    stops=st.lists(st.tuples(st.floats(0.1, 6.0), st.floats(0.0, 20.0)), min_size=1, max_size=4),
    silent=st.none() | st.floats(1.0, 10.0),
)
@example(stops=[(0.1, 3.0)], silent=None)
def test_a_gateway_that_was_stopped_loses_only_who_is_silent(
    stops: list[tuple[float, float]], silent: float | None
) -> None:
    """``stops``: how long after the last one, and how long. ``silent``: when a replica says its last."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        ends = {} if silent is None else {"r2": silent}
        async with gateway_of(Replicas(silent=ends)) as members:
            for after, seconds in stops:
                await asyncio.sleep(after)
                loop.go_to(loop.time() + seconds)  # as SIGSTOP, and then SIGCONT
            await asyncio.sleep(max(0.0, (silent or 0.0) - loop.time()) + CONFIG.silent_seconds + 0.6)
            assert members.members.keys() == set(NAMES) - ends.keys()
            assert members.losses.total() == len(ends)

    run_in_virtual_time(main())


@settings(max_examples=40)
@given(
    on_the_way=st.floats(0.0, ARRIVE_SECONDS - 1) | st.just(NEVER),
    between=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=6),
    stop=st.floats(0.0, 20.0),
    silent=st.floats(2.75, 40.0),
)
@example(on_the_way=NEVER, between=[0.0], stop=0.0, silent=2.75)
@example(on_the_way=6.0, between=[0.0, 0.5], stop=0.0, silent=2.75)  # a batch waits for the one before it
@pytest.mark.slow
def test_a_replica_that_reports_and_gets_no_requests_is_lost(
    on_the_way: float, between: list[float], stop: float, silent: float
) -> None:
    """One batch of orders is on its way at a time; the gateway itself stands still for a while as well."""
    config = msgspec.structs.replace(CONFIG, silent_seconds=silent)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        async with gateway_of(Replicas(far="r1", on_the_way=on_the_way), config) as members:
            for number, seconds in enumerate(between):
                await asyncio.sleep(seconds)
                for replica in sorted(members.members):
                    channel = members.channel(replica)
                    assert channel is not None
                    channel.send(_submit(number))
            loop.go_to(loop.time() + stop)  # as SIGSTOP, and then SIGCONT
            await asyncio.sleep(ARRIVE_SECONDS + 3.5)
            assert members.losses.total() == (on_the_way == NEVER)
            await asyncio.sleep(2.1)
            assert members.members.keys() == set(NAMES)  # it is tried again

    run_in_virtual_time(main())
