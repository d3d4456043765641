"""Gateways and replicas that are stopped for a while, as by a debugger or a full disk; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fleet_here import Stream, serve_names

from aioengine import EngineConfig
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.members import ARRIVE_SECONDS, Members
from aioengine.fleet.wire import Frame, Hello, Status, Submit, decode_orders, encode_frame
from aioengine.lab.simulation.clock import VirtualTimeLoop, run_in_virtual_time
from aioengine.request import RequestOptions
from aioengine.schedulers.routing import Report

CONFIG = FleetConfig(engine=EngineConfig(model="tiny"), replicas=3)
NEVER = 1e6
HANDS_OVER = 0.01
"""Seconds from a frame's arrival, which Ray's threads see, to the gateway's task that reads it."""


class Replicas:
    """Serve's handle of replicas that report at intervals, each until a time. Requests take ``on_the_way``
    seconds to those that are ``far``."""

    def __init__(self, until: dict[str, float], far: str = "", on_the_way: float = 0.0) -> None:
        self._until = until
        self._far = far
        self._on_the_way = on_the_way
        self._received: dict[str, int] = {}

    def options(self, method_name: str, **_: Any) -> Any:
        call = {"channel": self._channel, "submit": self._submit}.get(method_name, self._any)
        return SimpleNamespace(remote=call)

    async def _any(self) -> None:
        pass

    def _channel(self, _gateway: str, to: str) -> Any:
        return Stream(self._frames(to))

    async def _submit(self, _gateway: str, orders: bytes, to: str) -> None:
        await asyncio.sleep(self._on_the_way if to == self._far else 0.0)
        self._received[to] += len(decode_orders(orders))

    async def _frames(self, replica: str) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        self._received[replica] = 0
        hello: Hello | None = Hello(replica, 1, "node", "actor", 1, 1, 1, 1, "")
        sent = loop.time()
        while sent < self._until[replica]:
            await asyncio.sleep(sent - loop.time())  # what was sent while the gateway stood still is there
            await asyncio.sleep(HANDS_OVER)
            yield encode_frame(Frame(hello=hello, status=_status(sent, self._received[replica])))
            hello = None
            sent += CONFIG.heartbeat_seconds
        await asyncio.Event().wait()


def _status(sent_at: float, received: int) -> Status:
    nothing = (0, 0, 0, 0, 1, {})
    return Status(Report(sent_at, received, *nothing), step_age=0.0, draining=False, state="running")


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
        replicas = {"r0": 1e9, "r1": 1e9, "r2": 1e9 if silent is None else silent}
        members = Members(CONFIG, Replicas(replicas), gateway="gateway")
        members.start()
        await members.complete(10.0)
        for after, seconds in stops:
            await asyncio.sleep(after)
            loop.go_to(loop.time() + seconds)  # as SIGSTOP, and then SIGCONT
        lost = {"r2"} if silent is not None else set()
        await asyncio.sleep(max(0.0, (silent or 0.0) - loop.time()) + CONFIG.silent_seconds + 0.6)
        assert members.members.keys() == replicas.keys() - lost
        assert members.losses.total() == len(lost)
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        serve_names({"r0", "r1", "r2"}, patch)
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
        members = Members(
            config, Replicas({"r0": 1e9, "r1": 1e9, "r2": 1e9}, "r1", on_the_way), gateway="gateway"
        )
        members.start()
        await members.complete(10.0)
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
        assert members.members.keys() == {"r0", "r1", "r2"}  # it is tried again
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        serve_names({"r0", "r1", "r2"}, patch)
        run_in_virtual_time(main())


def test_a_replica_that_gets_nothing_is_tried_less_and_less() -> None:
    async def main() -> None:
        members = Members(CONFIG, Replicas({"r0": 1e9, "r1": 1e9, "r2": 1e9}, "r1", NEVER), gateway="gateway")
        members.start()
        await members.complete(10.0)
        for number in range(2000):
            if (channel := members.channel("r1")) is not None and "r1" in members.members:
                channel.send(_submit(number))
            await asyncio.sleep(0.5)
        assert 1000 / (ARRIVE_SECONDS + 70) <= members.losses["lost"] <= 1000 / (ARRIVE_SECONDS + 60) + 7
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        serve_names({"r0", "r1", "r2"}, patch)
        run_in_virtual_time(main())
