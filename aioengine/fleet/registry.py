"""The fleet's registry of adapters: an actor that outlives gateways and, with a checkpoint, Ray's head."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import msgspec

from aioengine.errors import ConfigError
from aioengine.fleet.usage import SharedUsage
from aioengine.info import AdapterInfo
from aioengine.model.files.sources import check_protocol, why_failed, without_credentials
from aioengine.runtime.client import Usage

logger = logging.getLogger("aioengine.fleet")

T = TypeVar("T")

NAMESPACE = "aioengine"
MAX_NAMES = 10_000
"""Unloaded adapters whose last version is remembered."""
MAX_CHANGES = 10_000
"""Number of changes that are remembered for gateways that were not told yet."""
_FILE = "adapters.json"
_BUCKETS = {"s3", "gs", "abfs", "oss", "oci"}
"""Protocols without folders: a new folder in a bucket that does not exist would make the bucket."""
_SUFFIX = "-registry"
"""End of the actor's name, after the fleet's."""


class Entry(msgspec.Struct, frozen=True, dict=True):
    """An adapter as the fleet knows it."""

    name: str
    path: str
    """The given folder or URL."""
    version: int
    """Increases with every replacement. No other content of this name has had it, nor will have it."""
    digest: str = ""
    """SHA-256 of its files, as the replica that read it reports it."""
    pinned: bool = False
    earlier: dict[int, str] = {}
    """Digests of the latest contents that were replaced, by version."""

    @property
    def number(self) -> int:
        """Its version; an adapter of the configuration that was never replaced has the first."""
        return max(self.version, 1)

    @cached_property
    def info(self) -> AdapterInfo:
        """What is said of it while no replica holds it."""
        said = {name: getattr(self, name) for name in ("name", "path", "digest", "pinned")}
        return AdapterInfo(**said, version=self.number)

    def was(self, digest: str) -> bool:
        """Whether this is the content of a version that was replaced."""
        return digest != self.digest and digest in self.earlier.values()


class Mark(NamedTuple):
    """A moment in the life of a registry's actor."""

    life: str
    """Different each time the actor is started."""
    number: int
    """Number of changes so far."""


class Changes(NamedTuple):
    """Changes since a :class:`Mark`."""

    mark: Mark
    """Mark to ask for later changes with."""
    entries: list[Entry]
    """Adapters as they are now: those that have changed or, if ``whole``, all of them."""
    removed: list[str]
    whole: bool


class _Checkpoint(msgspec.Struct):
    entries: list[Entry] = []
    unloaded: dict[str, int] = {}
    """Last versions of adapters that were unloaded."""
    forgotten: int = 0
    """The highest of those that are not in it any more."""


class AdapterRegistry:
    """The actor's class. ``checkpoint`` is a folder, as any fsspec URL; None: nothing is kept. ``temporary``:
    it is a local folder, and goes with the last gateway.

    The checkpoint is read at the first call that needs it. As long as that fails, such calls raise
    ConfigError, and the checkpoint is left alone.
    """

    def __init__(self, checkpoint: str | None, *, temporary: bool = False) -> None:
        self._url = checkpoint
        self._temporary = temporary
        self._file = None if checkpoint is None else f"{checkpoint.rstrip('/')}/{_FILE}"
        self._restored = self._file is None
        """Whether ``_entries`` has what is in the checkpoint."""
        self._io = asyncio.Lock()
        """Held while the checkpoint is read, and during a change, which is one once it is written."""
        self._entries: dict[str, Entry] = {}
        self._unloaded: dict[str, int] = {}
        """Last versions of at most ``MAX_NAMES`` unloaded adapters; the one unloaded last is at the end."""
        self._forgotten = 0
        """The highest of those that are not in it any more."""
        self._mark = Mark(uuid.uuid4().hex, 0)
        self._changed = deque[str](maxlen=MAX_CHANGES)
        """Names of the adapters that were changed, in order."""
        self._usage = SharedUsage(time.monotonic)
        self._config: bytes | None = None

    async def configure(self, config: bytes) -> bytes:
        """Return the fleet's configuration: the one of the first call, which also reads and writes the
        checkpoint. Raises ConfigError if that fails."""
        if self._config is None:
            await self._restore()
            async with self._io:
                await self._save(self._entries)
            self._config = self._config or config
        return self._config

    async def join(self, gateway: str, config: bytes) -> None:
        """Note that a gateway exists. It calls this again if this actor was restarted and does not know
        it."""
        self._config = self._config or config
        self._usage.join(gateway)

    async def leave(self, gateway: str) -> int:
        """Forget a gateway. Returns the number of gateways left."""
        left = self._usage.leave(gateway)
        if not left and self._temporary:
            await asyncio.to_thread(shutil.rmtree, str(self._url), ignore_errors=True)
        return left

    async def exchange(self, gateway: str, usage: dict[str, Usage]) -> dict[str, Usage] | None:
        """Exchange usage as :meth:`SharedUsage.exchange` does. This also shows that the gateway is alive."""
        return self._usage.exchange(gateway, usage)

    async def entries(self) -> list[Entry]:
        await self._restore()
        return list(self._entries.values())

    async def changes(self, since: Mark | None) -> Changes:
        """Return what has changed since a mark, so that a gateway need not read all adapters each time; all
        adapters for None, for a mark of another life, and if too much has changed. Raises ConfigError as
        :meth:`entries` does."""
        entries = await self.entries()
        new = 0 if since is None else self._mark.number - since.number
        if since is None or since.life != self._mark.life or new > len(self._changed):
            return Changes(self._mark, entries, [], True)
        names = dict.fromkeys(islice(reversed(self._changed), new))
        found = [self._entries[name] for name in names if name in self._entries]
        return Changes(self._mark, found, [name for name in names if name not in self._entries], False)

    async def change(self, name: str, before: Entry | None, after: Entry | None) -> tuple[bool, Entry | None]:
        """Put an entry in place of another one, also in the checkpoint if there is one; None: no entry. One
        in place of none gets a higher version, if the adapter has had its version before.

        Returns whether what was there is ``before``, and what is there now: if it was not, nothing has
        changed. Raises ConfigError, and changes nothing, if the checkpoint fails."""
        await self._restore()
        async with self._io:
            there = self._entries.get(name)
            if there != before and there != after:  # it is ``after`` if Ray has repeated a call
                return False, there
            entries = {other: entry for other, entry in self._entries.items() if other != name}
            if after is not None:
                if there is None:
                    last = self._unloaded.get(name, self._forgotten)
                    after = msgspec.structs.replace(after, version=max(after.version, last + 1))
                entries[name] = after
            elif there is not None:
                self._unloaded.pop(name, None)
                self._unloaded[name] = there.version
                if len(self._unloaded) > MAX_NAMES:
                    oldest = self._unloaded.pop(next(iter(self._unloaded)))
                    self._forgotten = max(self._forgotten, oldest)
            await self._save(entries)
            self._entries = entries
            self._mark = self._mark._replace(number=self._mark.number + 1)
            self._changed.append(name)
        return True, after

    async def _restore(self) -> None:
        if self._restored:
            return  # who only reads does not wait for a write
        async with self._io:
            if not self._restored and self._file is not None:
                found = await self._checkpoint("read", _read, self._file)
                self._entries = {entry.name: entry for entry in found.entries}
                self._unloaded, self._forgotten = found.unloaded, found.forgotten
                self._restored = True

    async def _save(self, entries: Mapping[str, Entry]) -> None:
        if self._file is not None:
            data = msgspec.json.encode(_Checkpoint(list(entries.values()), self._unloaded, self._forgotten))
            await self._checkpoint("written", write_file, self._file, data)

    async def _checkpoint(self, done: str, work: Callable[..., T], *arguments: Any) -> T:
        """Run ``work`` in a thread. Raises ConfigError with the reason if it fails."""
        try:
            await asyncio.to_thread(check_protocol, str(self._url), "registry")
            return await asyncio.to_thread(work, *arguments)
        except ConfigError as error:
            raise ConfigError(f"{error} (on the node of Ray's head, where the registry runs)") from None
        except Exception as error:  # each filesystem raises its own types
            raise ConfigError(
                f"registry={without_credentials(str(self._url))!r}: cannot be {done}: {why_failed(error)[0]}"
            ) from None  # its cause may not survive the way to the gateway


def _read(url: str) -> _Checkpoint:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    if not system.exists(path):
        return _Checkpoint()
    return msgspec.json.decode(system.cat_file(path), type=_Checkpoint)


def write_file(url: str, data: bytes, *, part: str = ".new") -> None:
    """Write a file under another name first, which ends with ``part``, so that no half-written file is ever
    read."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    if not _BUCKETS.intersection((system.protocol,) if isinstance(system.protocol, str) else system.protocol):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
    system.pipe_file(path + part, data)
    system.mv(path + part, path)


def registry_actor(application: str, checkpoint: str | None) -> Any:
    """Return the actor of an application; makes it if there is none yet. It runs on Ray's head node, so that
    the loss of another node does not end it. Without a ``checkpoint`` that of the actor is a temporary folder
    there, which outlives its process."""
    import ray

    temporary = f"{tempfile.gettempdir()}/ray/aioengine-registry-{uuid.uuid4().hex}"

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
    ).remote(checkpoint or temporary, temporary=checkpoint is None)


async def answer_of(call: Awaitable[T]) -> T:
    """Await a call to the actor. Raises ConfigError as the actor raised it; Ray's own has a traceback in its
    text."""
    try:
        return await call
    except Exception as error:
        raise config_error_in(error) or error from None


def config_error_in(error: Exception) -> ConfigError | None:
    """Return the actor's ConfigError that one of Ray's errors carries, if it does."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ConfigError) else None


def fleets_of_cluster() -> list[str]:
    """Return the names of the fleets on the cluster that this process has joined, by their registries.
    Blocks."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
