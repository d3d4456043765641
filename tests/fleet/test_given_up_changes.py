"""Changes of adapters whose gateway loses its right in the middle: no replica keeps what was prepared for
them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from support.adapter_infos import adapter_info
from support.fleet_process import needs_ray
from support.registry_actor import RegistryActor
from support.small_fleet import Gateway, replica

from aioengine.errors import AdapterLoadError
from aioengine.fleet.registry import LEASE_SECONDS
from aioengine.fleet.wire import Residency
from aioengine.lab.simulation.clock import run_in_virtual_time

needs_ray()


class Cut:
    """The registry, as a gateway reaches it that is cut off after its right was given to it once.
    ``silent``: the other call that has no answer."""

    def __init__(self, registry: Any, silent: str = "end") -> None:
        self._registry, self._left, self._silent = registry, 1, silent

    def __getattr__(self, call: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self._left -= call == "begin"
            if self._left < 0 or call == self._silent:
                return asyncio.get_running_loop().create_future()
            return getattr(self._registry, call).remote(*arguments)

        return SimpleNamespace(remote=remote)


async def gateway_to(ones: list[Any], registry: Any, before: Any = None) -> Gateway:
    """Return a gateway to two replicas that have the adapter in memory, and so read a new version."""
    made = Gateway(ones[0], before, ones[1])
    for member in made.members.members.values():
        member.residency = Residency([], [adapter_info("sql")])
    await made.adapters.start_adapters(registry)
    return made


async def replicas_that_read(*seconds: float) -> list[Any]:
    ones = [await replica() for _ in seconds]
    for one, each in zip(ones, seconds, strict=True):
        one.engine.seconds = each
    return ones


@pytest.mark.parametrize("reads", [(1.0, 100.0), (100.0, 100.0)])
def test_who_loses_the_right_leaves_what_another_gateway_prepares(reads: tuple[float, float]) -> None:
    """Its own read is still going on when the other one begins."""

    async def main() -> None:
        registry, ones = RegistryActor(), await replicas_that_read(*reads)
        cut, other = await gateway_to(ones, Cut(registry)), await gateway_to(ones, registry)
        losing = asyncio.ensure_future(cut.adapters.load_adapter("sql", "old", pin=False, replace=True))
        await asyncio.sleep(1.0)
        changing = asyncio.ensure_future(other.adapters.load_adapter("sql", "new", pin=False, replace=True))
        with pytest.raises(AdapterLoadError, match="did not reach the registry"):
            await losing
        await changing
        await asyncio.sleep(200.0)
        assert [(one.engine.has, one.engine.prepared) for one in ones] == [({"sql": "new"}, {})] * 2
        for gateway in (cut, other):
            await gateway.adapters.stop_adapters()

    run_in_virtual_time(main())


def test_who_loses_the_right_before_the_registry_knows_tells_replicas_nothing_more() -> None:
    async def main() -> None:
        asked: list[str] = []

        async def note(action: str) -> None:
            asked.append(action)

        cut = await gateway_to(await replicas_that_read(1.0, 1.0), Cut(RegistryActor(), "put"), note)
        with pytest.raises(AdapterLoadError, match="did not reach the registry"):
            await cut.adapters.load_adapter("sql", "old", pin=False, replace=True)
        assert asyncio.get_running_loop().time() < 2 * LEASE_SECONDS
        assert "sync" not in asked[asked.index("commit") :]
        await cut.adapters.stop_adapters()

    run_in_virtual_time(main())
