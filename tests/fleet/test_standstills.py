"""Doors and replicas that are stopped for a while, as by a debugger or a full disk; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fleet_here import Stream, serve_names

from aioengine import EngineConfig
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.door.members import Members
from aioengine.fleet.wire import Frame, Hello, encode_frame
from aioengine.lab.simulation.clock import VirtualTimeLoop, run_in_virtual_time

CONFIG = FleetConfig(engine=EngineConfig(model="tiny"), replicas=3)
HANDS_OVER = 0.01
"""Seconds from a frame's arrival, which Ray's threads see, to the door's task that reads it."""


class Replicas:
    """Serve's handle of replicas that report at intervals, each until a time."""

    def __init__(self, until: dict[str, float]) -> None:
        self._until = until

    def options(self, **_: Any) -> Any:
        return SimpleNamespace(remote=self._call)

    def _call(self, *_: Any, to: str | None = None) -> Any:
        return Stream(self._frames(to)) if to is not None else asyncio.sleep(0)

    async def _frames(self, replica: str) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        hello = Hello(replica, 1, "node", "actor", 1, 1, 1, 1, "")
        sent = loop.time()
        while sent < self._until[replica]:
            await asyncio.sleep(sent - loop.time())  # what was sent while the door stood still is there
            await asyncio.sleep(HANDS_OVER)
            yield encode_frame(Frame(hello=hello))
            sent += CONFIG.heartbeat_seconds
        await asyncio.Event().wait()


@settings(max_examples=30)
@given(
    stops=st.lists(st.tuples(st.floats(0.1, 6.0), st.floats(0.0, 20.0)), min_size=1, max_size=4),
    silent=st.none() | st.floats(1.0, 10.0),
)
@example(stops=[(0.1, 3.0)], silent=None)
def test_a_door_that_was_stopped_loses_only_who_is_silent(
    stops: list[tuple[float, float]], silent: float | None
) -> None:
    """``stops``: how long after the last one, and how long. ``silent``: when a replica says its last."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        replicas = {"r0": 1e9, "r1": 1e9, "r2": 1e9 if silent is None else silent}
        members = Members(CONFIG, Replicas(replicas), door="door")
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
