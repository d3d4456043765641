"""The fleet's registry of adapters: an actor that outlives doors and, with a checkpoint, Ray's head."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import msgspec

from aioengine.client import Usage
from aioengine.fleet.usage import SharedUsage

logger = logging.getLogger("aioengine.fleet")

NAMESPACE = "aioengine"
LEASE_SECONDS = 600.0
"""Maximum seconds that a lost door, which was changing an adapter, blocks other doors."""
_FILE = "adapters.json"
_SUFFIX = "-registry"
"""End of the actor's name, after the fleet's."""


class Entry(msgspec.Struct, frozen=True):
    """An adapter as the fleet knows it."""

    name: str
    path: str
    """The given folder or URL."""
    version: int
    """Increases with every load and replacement."""
    digest: str = ""
    """SHA-256 of its files, as the replica that read it reports it."""
    pinned: bool = False


class AdapterRegistry:
    """The actor's class. ``checkpoint`` is a folder, as any fsspec URL; None: nothing is kept."""

    def __init__(self, checkpoint: str | None) -> None:
        self._file = None if checkpoint is None else f"{checkpoint.rstrip('/')}/{_FILE}"
        self._entries: dict[str, Entry] = {}
        self._leases: dict[str, tuple[str, float]] = {}
        self._usage = SharedUsage(time.monotonic)
        self._config: bytes | None = None
        if self._file is not None:
            self._entries = {entry.name: entry for entry in _read(self._file)}

    async def configure(self, config: bytes) -> bytes:
        """Return the fleet's configuration: the one of the first call."""
        if self._config is None:
            self._config = config
        return self._config

    async def join(self, door: str, config: bytes) -> None:
        """Note that a door exists. It calls this again if this actor was restarted and does not know it."""
        await self.configure(config)
        self._usage.join(door)

    async def leave(self, door: str) -> int:
        """Forget a door. Returns the number of doors left."""
        return self._usage.leave(door)

    async def exchange(self, door: str, usage: dict[str, Usage]) -> dict[str, Usage] | None:
        """Exchange usage as :meth:`SharedUsage.exchange` does. This also shows that the door is alive."""
        return self._usage.exchange(door, usage)

    async def entries(self) -> list[Entry]:
        return list(self._entries.values())

    async def begin(self, name: str, owner: str) -> None:
        """Wait until no other door changes the adapter. Then ``owner`` may change it, until :meth:`end`."""
        loop = asyncio.get_running_loop()
        while True:
            holder = self._leases.get(name)
            if holder is None or holder[0] == owner or loop.time() > holder[1]:
                break
            await asyncio.sleep(0.05)
        self._leases[name] = owner, loop.time() + LEASE_SECONDS

    async def end(self, name: str, owner: str) -> None:
        if self._leases.get(name, ("", 0.0))[0] == owner:
            del self._leases[name]

    async def put(self, entry: Entry) -> None:
        """Store an entry, also in the checkpoint if there is one."""
        self._entries[entry.name] = entry
        await self._write()

    async def remove(self, name: str) -> None:
        self._entries.pop(name, None)
        await self._write()

    async def _write(self) -> None:
        if self._file is not None:
            await asyncio.to_thread(_write, self._file, msgspec.json.encode(list(self._entries.values())))


def _read(url: str) -> list[Entry]:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    if not system.exists(path):
        return []
    data: bytes = system.cat_file(path)
    return msgspec.json.decode(data, type=list[Entry])


def _write(url: str, data: bytes) -> None:
    """Write the checkpoint under another name first, so that no half-written file is ever read."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    system.pipe_file(f"{path}.new", data)
    system.mv(f"{path}.new", path)


def registry_actor(application: str, checkpoint: str | None) -> Any:
    """Return the actor of an application; makes it if there is none yet. It runs on Ray's head node, so that
    the loss of another node does not end it."""
    import ray

    actor = ray.remote(AdapterRegistry)
    return actor.options(
        name=f"{application}{_SUFFIX}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=3,
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
        max_concurrency=1000,
    ).remote(checkpoint)


def fleets_of_cluster() -> list[str]:
    """Return the names of the fleets on the cluster that this process has joined, by their registries.
    Blocks."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
