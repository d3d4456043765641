"""What a gateway makes of Serve's lists of replicas: who is in one, who is not any more, and who comes
back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fleet_here import Stream, serve_names

from aioengine import EngineConfig, SamplingParams
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway import hangs
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.hangs import HungReplicas
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.wire import Frame, Hello, Status, encode_frame
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.request import RequestOptions
from aioengine.schedulers.routing import Report

NAMES = ("r0", "r1", "r2")
CONFIG = FleetConfig(engine=EngineConfig(model="tiny"), replicas=3)


class Replicas:
    """Serve's handle of replicas that report, each until it dies at its time. From then on Serve would give
    calls to another one, which refuses them."""

    def __init__(self, dies: dict[str, float] | None = None) -> None:
        self._dies = dies or {}
        self.opened: list[str] = []

    def options(self, method_name: str, **_: Any) -> Any:
        return SimpleNamespace(remote=self._channel if method_name == "channel" else self._any)

    async def _any(self, *_: Any, **__: Any) -> None:
        pass

    def _channel(self, _name: str, to: str) -> Any:
        self.opened.append(to)
        return Stream(self._frames(to))

    async def _frames(self, replica: str) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        hello: Hello | None = Hello(replica, 1, "node", "actor", 1, 1, 1, 1, "")
        while loop.time() < self._dies.get(replica, 1e9):
            yield encode_frame(Frame(hello=hello, status=_status(loop.time())))
            hello = None
            await asyncio.sleep(CONFIG.heartbeat_seconds)
        raise LookupError(f"replica {replica} is gone")


def _status(sent_at: float) -> Status:
    nothing = (0, 0, 0, 0, 0, 1, {})
    return Status(Report(sent_at, *nothing), step_age=0.0, draining=False, state="running")


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
        members = Members(CONFIG, Replicas(), gateway="gateway")
        members.start()
        await members.complete(10.0)

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
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        serve_names(set(NAMES), patch)
        run_in_virtual_time(main())


def test_a_replica_that_dies_is_one_loss(caplog: pytest.LogCaptureFixture) -> None:
    """Serve lists it for some seconds afterwards, and the gateway tries it again meanwhile."""
    caplog.set_level(logging.WARNING, "aioengine.fleet")

    async def main() -> None:
        replicas = Replicas({"r1": 5.0})
        members = Members(CONFIG, replicas, gateway="gateway")
        members.start()
        await members.complete(10.0)
        await asyncio.sleep(15.0)
        assert replicas.opened.count("r1") > 5
        assert members.losses == {"lost": 1}
        assert sum("r1" in record.getMessage() for record in caplog.records) == 1
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        serve_names(set(NAMES), patch)
        run_in_virtual_time(main())


async def test_all_that_hang_are_killed_once_and_none_that_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setattr(hangs, "_kill", lambda hello: killed.append(hello.replica))
    hung = HungReplicas()
    names = [f"r{number}" for number in range(8)]
    for name in names:
        hung.add(name, Hello(name, 1, "node", "actor", 1, 1, 1, 1, ""))
    several = [asyncio.create_task(hung.end_all_but({"r0"})) for _ in range(3)]
    await asyncio.sleep(0)
    back = next(name for name in reversed(names) if name in hung._lost and name != "r0")
    hung.back(back)
    await asyncio.gather(*several)
    assert sorted(killed) == sorted(set(names) - {"r0", back})
