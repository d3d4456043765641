"""One change of an adapter at a time, whatever becomes of those who wait for their turn."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.adapter_infos import adapter_info
from support.registry_actor import RegistryActor

from aioengine import EngineConfig
from aioengine.errors import AdapterLoadError
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.registry import LEASE_SECONDS, WAIT_SECONDS
from aioengine.info import AdapterInfo
from aioengine.lab.simulation.clock import run_in_virtual_time

pytest.importorskip("ray.exceptions", reason="Ray has no wheel for this system or Python")


class Busy:
    """Who changes the adapter now."""

    def __init__(self) -> None:
        self.now: set[str] = set()
        self.most = 0

    def begin(self, gateway: str) -> None:
        self.now.add(gateway)
        self.most = max(self.most, len(self.now))


class Gateway:
    """A gateway that changes an adapter for ``seconds``."""

    def __init__(self, name: str, actor: RegistryActor, busy: Busy, seconds: float) -> None:
        self.ended: float | None = None
        self.reaches = asyncio.Event()
        """Cleared while what it says to the registry only arrives later."""
        self.reaches.set()
        self.name, self._actor, self._busy, self._seconds = name, actor, busy, seconds
        self._hears = True
        config = FleetConfig(engine=EngineConfig(model="tiny"))
        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._replica))
        members = Members(config, handle, gateway=name)
        members.members["r0"] = Member(SimpleNamespace(replica="r0"), None)  # type: ignore[arg-type]
        self._adapters = FleetAdapters(config, members)

    async def _replica(self, action: str, arguments: dict[str, Any], to: str) -> AdapterInfo | None:
        if action == "prepare":
            self._busy.begin(self.name)
            try:
                await asyncio.sleep(self._seconds)
            finally:
                self._busy.now.discard(self.name)
        if action not in ("prepare", "commit"):
            return None
        return adapter_info("sql", digest=self.name)

    def __getattr__(self, call: str) -> Any:
        """The registry, as this gateway reaches it."""

        def remote(*arguments: Any) -> asyncio.Future[Any]:
            if not self._hears:
                raise ConnectionError
            if not self.reaches.is_set():

                async def late() -> Any:
                    await self.reaches.wait()
                    return await getattr(self._actor, call).remote(*arguments)

                return asyncio.ensure_future(late())
            answer: asyncio.Future[Any] = getattr(self._actor, call).remote(*arguments)
            return answer

        return SimpleNamespace(remote=remote)

    async def change(self) -> None:
        await self._adapters.start_adapters(self)
        try:
            await self.load()
            self.ended = asyncio.get_running_loop().time()
        finally:
            with suppress(ConnectionError):
                await self._adapters.stop_adapters()

    async def load(self) -> None:
        await self._adapters.load_adapter("sql", "sql", pin=False, replace=True)

    def cut(self, how: str) -> None:
        """From now on the registry does not hear what it says: calls fail at once, or (``how`` is "hangs")
        have no answer."""
        if how == "hangs":
            self.reaches.clear()
        else:
            self._hears = False


class Change(NamedTuple):
    begins: float
    takes: float
    ends: tuple[str, float] | None
    """How it is cut off, and how long after its beginning."""


ENDS = st.tuples(st.sampled_from(["cancelled", "dies", "hangs", "fails"]), st.floats(0, 200))
"""A gateway that dies is cut off from the registry, and does nothing more. If its calls hang or fail, it is
only cut off."""
CHANGES = st.builds(
    Change,
    begins=st.floats(0, 100),
    takes=st.floats(0, 3 * LEASE_SECONDS),
    ends=st.none() | ENDS,
)


@given(st.lists(CHANGES, min_size=1, max_size=6))
@pytest.mark.slow
def test_changes_wait_for_each_other_and_for_nobody_else(changes: list[Change]) -> None:
    """Who is cancelled, however far it has come, blocks nobody; who dies blocks others for a lease. Who is
    cut off goes on for a lease at most, and ends its change by itself."""

    async def main() -> None:
        actor, busy = RegistryActor(), Busy()
        gateways = [Gateway(f"d{index}", actor, busy, change.takes) for index, change in enumerate(changes)]

        async def one(gateway: Gateway, change: Change) -> None:
            await asyncio.sleep(change.begins)
            task = asyncio.ensure_future(gateway.change())
            if change.ends is None:
                await task
                return
            how, after = change.ends
            await asyncio.wait([task], timeout=after)
            if how != "cancelled":
                gateway.cut(how)
            if how in ("hangs", "fails"):
                await asyncio.wait([task], timeout=LEASE_SECONDS + 0.001)
                assert gateway.name not in busy.now
            task.cancel()
            with suppress(asyncio.CancelledError, ConnectionError, AdapterLoadError):
                await task

        await asyncio.gather(
            *[one(gateway, change) for gateway, change in zip(gateways, changes, strict=True)]
        )
        assert busy.most <= 1
        deaths = sum(change.ends is not None and change.ends[0] != "cancelled" for change in changes)
        last = max(change.begins for change in changes) + sum(change.takes for change in changes)
        last += deaths * (LEASE_SECONDS + WAIT_SECONDS) + len(changes) * 0.2
        for gateway, change in zip(gateways, changes, strict=True):
            if change.ends is None:
                assert gateway.ended is not None and gateway.ended <= last

    run_in_virtual_time(main())


def test_a_registry_that_hangs_is_said() -> None:
    """Ray does not restart it: a change must not wait for ever, and nothing may have begun."""

    async def main() -> None:
        loop, actor, busy = asyncio.get_running_loop(), RegistryActor(), Busy()
        gateway, other = Gateway("gateway", actor, busy, 1.0), Gateway("other", actor, busy, 1.0)
        await gateway.change()
        begun = loop.time()
        gateway.cut("hangs")
        with pytest.raises(AdapterLoadError, match="has not answered for 30 s; nothing was changed") as told:
            await gateway.load()
        assert told.value.transient and not busy.now
        assert loop.time() - begun == LEASE_SECONDS + WAIT_SECONDS
        await other.change()
        gateway.reaches.set()  # what it has asked for then begins and ends
        await asyncio.sleep(1.0)
        begun = loop.time()
        await other.load()
        assert loop.time() - begun < 1.2

    run_in_virtual_time(main())
