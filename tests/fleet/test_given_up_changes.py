"""Changes of adapters that end in the middle: no replica keeps what it has prepared for them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapter_infos import adapter_info
from support.fleet_process import needs_ray
from support.name_locks import NameLocks
from support.registry_actor import RegistryActor

from aioengine import EngineConfig
from aioengine.errors import AdapterLoadError
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.registry import LEASE_SECONDS
from aioengine.fleet.replica import EngineReplica
from aioengine.info import AdapterInfo
from aioengine.lab.simulation.clock import run_in_virtual_time

needs_ray()

CONFIG = FleetConfig(engine=EngineConfig(model="tiny"))
NAMES = ("r0", "r1")


class Engine:
    """An engine that reads for ``seconds``, as those do that have adapters on a slow disk."""

    def __init__(self, seconds: float) -> None:
        self.prepared: dict[str, str | None] = {}
        """Where it has read what is prepared."""
        self.has: dict[str, str | None] = {}
        self._seconds = seconds
        self._locks = NameLocks()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    async def prepare_adapter(self, name: str, path: str | None, *, read: bool) -> AdapterInfo:
        async with self._locks.hold(name):
            self.prepared.pop(name, None)
            await asyncio.sleep(self._seconds if read else 0.0)
            self.prepared[name] = path
        return adapter_info(name, digest=str(path))

    def commit_adapter(self, name: str) -> AdapterInfo:
        self.has[name] = self.prepared.pop(name)
        return adapter_info(name, digest=str(self.has[name]))

    def discard_adapter(self, name: str) -> None:
        self.prepared.pop(name, None)


class Replica(EngineReplica):
    seconds = 0.0

    async def start_engine(self) -> Any:
        return Engine(self.seconds)

    def __del__(self) -> None:  # type: ignore[override] # nobody would await it
        pass


async def replicas_of(seconds: tuple[float, ...]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, each in zip(NAMES, seconds, strict=True):
        made[name] = Replica.__new__(Replica)
        made[name].seconds = each
        await made[name].__init__(CONFIG, "")
    return made


class Gateway:
    """A gateway to replicas. They go on with what they were asked for, whoever waits for it, as with Ray."""

    def __init__(self, name: str, made: dict[str, Any], registry: Any, delay: float = 0.0) -> None:
        self.asked: list[str] = []
        self._registry = registry

        def remote(action: str, arguments: dict[str, Any], to: str) -> asyncio.Future[Any]:
            async def call() -> Any:
                self.asked.append(action)
                await asyncio.sleep(delay)
                return await made[to].adapter(action, dict(arguments))

            return asyncio.shield(asyncio.ensure_future(call()))

        members = Members(
            CONFIG, SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote)), gateway=name
        )
        self.adapters = FleetAdapters(CONFIG, members)
        for replica in made:
            members.members[replica] = Member(SimpleNamespace(replica=replica), None)  # type: ignore[arg-type]
            members.members[replica].residency.adapters.append(adapter_info("sql"))

    async def replace(self, path: str) -> None:
        await self.adapters.start(self._registry)
        try:
            await self.adapters.load("sql", path, pin=False, replace=True)
        finally:
            await self.adapters.stop()


class Given(NamedTuple):
    """A change, and after how many seconds its caller goes away."""

    begins: float
    delay: float
    cancelled: float | None


TIMES = st.floats(0, 20)
CHANGES = st.lists(st.builds(Given, TIMES, st.floats(0, 1), st.none() | TIMES), min_size=1, max_size=5)


@settings(max_examples=60)
@given(changes=CHANGES, reads=st.tuples(st.floats(0, 10), st.floats(0, 10)))
@pytest.mark.slow
def test_who_gives_up_leaves_nothing_prepared_and_disturbs_nobody(
    changes: list[Given], reads: tuple[float, float]
) -> None:
    async def main() -> None:
        registry, made = RegistryActor(), await replicas_of(reads)

        async def one(number: int, change: Given) -> None:
            await asyncio.sleep(change.begins)
            replacing = asyncio.ensure_future(
                Gateway(f"d{number}", made, registry, change.delay).replace(f"path-{number}")
            )
            if change.cancelled is None:
                await replacing
                return
            await asyncio.wait([replacing], timeout=change.cancelled)
            replacing.cancel()
            with suppress(asyncio.CancelledError):
                await replacing

        await asyncio.gather(*[one(number, change) for number, change in enumerate(changes)])
        await asyncio.sleep(30.0)
        assert [replica.engine.prepared for replica in made.values()] == [{}, {}]
        assert all(not replica._adapters.prepared._changes for replica in made.values())
        if all(change.cancelled is None for change in changes):
            [path] = {replica.engine.has["sql"] for replica in made.values()}
            assert path is not None

    run_in_virtual_time(main())


@pytest.mark.parametrize("reads", [(1.0, 100.0), (100.0, 100.0)])
def test_who_loses_the_right_leaves_what_another_gateway_prepares(reads: tuple[float, float]) -> None:
    """Its own read is still going on when the other one begins."""

    async def main() -> None:
        registry, made = RegistryActor(), await replicas_of(reads)
        cut, other = Gateway("cut", made, Cut(registry, after=1)), Gateway("other", made, registry)
        losing = asyncio.ensure_future(cut.replace("old"))
        await asyncio.sleep(1.0)
        changing = asyncio.ensure_future(other.replace("new"))
        with pytest.raises(AdapterLoadError, match="did not reach the registry"):
            await losing
        await changing
        assert [replica.engine.has for replica in made.values()] == [{"sql": "new"}] * 2
        assert [replica.engine.prepared for replica in made.values()] == [{}, {}]

    run_in_virtual_time(main())


def test_who_loses_the_right_before_the_registry_knows_tells_replicas_nothing_more() -> None:
    async def main() -> None:
        registry, made = RegistryActor(), await replicas_of((1.0, 1.0))
        cut = Gateway("cut", made, Cut(registry, after=1, silent="put"))
        with pytest.raises(AdapterLoadError, match="did not reach the registry"):
            await cut.replace("old")
        assert asyncio.get_running_loop().time() < 2 * LEASE_SECONDS
        told = cut.asked[cut.asked.index("commit") :]
        assert "sync" not in told

    run_in_virtual_time(main())


class Cut:
    """The registry, as a gateway reaches it that is cut off after its right was given to it ``after`` times.
    ``silent``: the other call that has no answer."""

    def __init__(self, registry: Any, after: int, silent: str = "end") -> None:
        self._registry, self._left, self._silent = registry, after, silent

    def __getattr__(self, call: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self._left -= call == "begin"
            if self._left < 0 or call == self._silent:
                return asyncio.get_running_loop().create_future()
            return getattr(self._registry, call).remote(*arguments)

        return SimpleNamespace(remote=remote)
