"""Changes of adapters that are cancelled at any point: made everywhere or nowhere, and nothing is left."""

from __future__ import annotations

import asyncio

import pytest
from support.adapter_infos import adapter_info
from support.cancel_at import Moment, cancel_everywhere
from support.fleet_process import needs_ray
from support.registry_actor import RegistryActor
from support.small_fleet import Gateway, replica

from aioengine.fleet.wire import Residency
from aioengine.lab.simulation.clock import run_in_virtual_time

needs_ray()


@pytest.mark.parametrize("moment", ["waiting", "resuming"])
@pytest.mark.parametrize("what", ["load", "replace", "unload", "pin", "load again"])
def test_a_cancelled_change_is_made_everywhere_or_nowhere(what: str, moment: Moment) -> None:
    """Wherever it is cancelled, all replicas have what the registry has, and nothing is left of it."""

    async def main() -> None:
        actor, ones = RegistryActor(), [await replica(), await replica()]

        async def before(action: str) -> None:
            await asyncio.sleep(0.01)

        gateway = Gateway(ones[0], before, ones[1])
        await gateway.adapters.start_adapters(actor)
        for index, member in enumerate(gateway.members.members.values()):  # both have it in memory
            held = adapter_info("sql", version=index + 1, digest="sql")
            member.residency = Residency([], [held])

        async def work() -> None:
            if what == "unload":
                await gateway.adapters.unload_adapter("sql", force=False)
            elif what == "pin":
                await gateway.adapters.pin_adapter("sql", force=False)
            else:
                await gateway.load("sql", replace=what == "replace")

        async def after() -> None:
            await asyncio.sleep(1.0)
            entries = await actor.entries.remote()
            found = {entry.name: entry.version for entry in entries}
            pinned = {entry.name for entry in entries if entry.pinned}
            for one in ones:
                assert not one.engine.prepared and one.engine.pinned == pinned
                assert one.engine.has.keys() == found.keys()
                assert one._adapters._told == found
            assert {n: known.version for n, known in gateway.adapters.known.by_name.items()} == found
            if what != "load" or "sql" not in found:
                await asyncio.wait_for(gateway.load("sql"), 1.0)  # no change blocks the next one
            if what == "load":
                await gateway.adapters.unload_adapter("sql", force=False)
            elif pinned:
                await gateway.adapters.unpin_adapter("sql")

        if what != "load":
            await gateway.load("sql")
        assert await cancel_everywhere(work, moment, after) >= 3
        await gateway.adapters.stop_adapters()

    run_in_virtual_time(main())
