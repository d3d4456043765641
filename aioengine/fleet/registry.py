"""The fleet's registry of adapters: an actor that outlives gateways and, with a checkpoint, Ray's head."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec

from aioengine.errors import AdapterLoadError, ConfigError
from aioengine.fleet.usage import SharedUsage
from aioengine.fleet.versions import SpentVersions
from aioengine.model.files.sources import check_protocol, why_failed, without_credentials
from aioengine.runtime.client import Usage

logger = logging.getLogger("aioengine.fleet")

T = TypeVar("T")

NAMESPACE = "aioengine"
LEASE_SECONDS = 30.0
"""Seconds for which a gateway may change an adapter, and then others may; it renews this while it works. So a
gateway that is lost meanwhile does not block others for longer."""
WAIT_SECONDS = 5.0
"""How long the registry lets a gateway wait for its turn until the gateway has to ask again, which shows that
it lives."""
MAX_CHANGES = 10_000
"""Number of adapters whose last changes are remembered for gateways that were not told yet."""
_FILE = "adapters.json"
_BUCKETS = {"s3", "gs", "abfs", "oss", "oci"}
"""Protocols without folders: a new folder in a bucket that does not exist would make the bucket."""
_SUFFIX = "-registry"
"""End of the actor's name, after the fleet's."""


class Entry(msgspec.Struct, frozen=True):
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
    entries: list[Entry]
    spent: SpentVersions


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
        """Held while the checkpoint is read or written, so that the last write has the newest entries."""
        self._entries: dict[str, Entry] = {}
        self._spent = SpentVersions()
        self._mark = Mark(uuid.uuid4().hex, 0)
        self._changed: dict[str, int] = {}
        """Number of the last change of an adapter, in order; only of the last ``MAX_CHANGES`` adapters."""
        self._leases: dict[str, tuple[str, float]] = {}
        """By adapter: who may change it, and until when."""
        self._waiting: set[tuple[str, str]] = set()
        """Adapters that somebody waits for, each with who waits."""
        self._usage = SharedUsage(time.monotonic)
        self._config: bytes | None = None

    async def configure(self, config: bytes) -> bytes:
        """Return the fleet's configuration: the one of the first call, which also reads and writes the
        checkpoint. Raises ConfigError if that fails."""
        if self._config is None:
            await self._restore()
            await self._save()
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
        first = next(iter(self._changed.values()), 0) if len(self._changed) == MAX_CHANGES else 0
        if since is None or since.life != self._mark.life or since.number + 1 < first:
            return Changes(self._mark, entries, [], True)
        names: list[str] = []
        for name, number in reversed(self._changed.items()):
            if number <= since.number:
                break
            names.append(name)
        found = [self._entries[name] for name in names if name in self._entries]
        return Changes(self._mark, found, [name for name in names if name not in self._entries], False)

    async def begin(self, name: str, owner: str) -> bool:
        """Wait until nobody else changes the adapter. Then ``owner`` may change it for ``LEASE_SECONDS``, and
        longer if it calls this again meanwhile. Returns whether it may: not if it was still waiting after
        ``WAIT_SECONDS``, because it may be gone, or if :meth:`end` was called."""
        loop = asyncio.get_running_loop()
        due = loop.time() + WAIT_SECONDS
        self._waiting.add((name, owner))
        while (name, owner) in self._waiting:
            holder, until = self._leases.get(name, (owner, 0.0))
            if holder == owner or loop.time() > until:
                self._waiting.remove((name, owner))
                self._leases[name] = owner, loop.time() + LEASE_SECONDS
                return True
            if loop.time() >= due:
                self._waiting.remove((name, owner))
            await asyncio.sleep(0.05)
        return False

    async def end(self, name: str, owner: str) -> None:
        """Let others change the adapter; also called by who waits no more."""
        self._waiting.discard((name, owner))
        if self._leases.get(name, ("", 0.0))[0] == owner:
            del self._leases[name]

    async def next_version(self, name: str, above: int) -> int:
        """Return a version for the next content of an adapter: one that was never returned before, nor used
        by an entry, and higher than ``above``. Raises ConfigError as :meth:`entries` does."""
        await self._restore()
        there = self._entries.get(name)
        number = max(self._spent.of(name), above, 0 if there is None else there.version) + 1
        self._spent.spend(name, number)
        await self._save()  # before it is used, so that nobody else needs to know it
        return number

    async def put(self, entry: Entry) -> None:
        """Store an entry, also in the checkpoint if there is one. Raises ConfigError if only the checkpoint
        fails; the next change writes this one, too."""
        await self._restore()
        self._entries[entry.name] = entry
        self._spent.entered(entry.name, entry.version)
        self._note(entry.name)
        await self._save()

    async def remove(self, name: str) -> None:
        """Remove an entry, as :meth:`put` stores one."""
        await self._restore()
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._spent.spend(name, entry.version)
            self._note(name)
        await self._save()

    def _note(self, name: str) -> None:
        """Note that an adapter has changed."""
        self._mark = self._mark._replace(number=self._mark.number + 1)
        self._changed.pop(name, None)
        self._changed[name] = self._mark.number
        if len(self._changed) > MAX_CHANGES:
            del self._changed[next(iter(self._changed))]

    async def _restore(self) -> None:
        if self._restored:
            return  # who only reads does not wait for a write
        async with self._io:
            if not self._restored and self._file is not None:
                found = await self._checkpoint("read", _read, self._file)
                self._entries = {entry.name: entry for entry in found.entries}
                self._spent = found.spent
                self._restored = True

    async def _save(self) -> None:
        async with self._io:
            if self._file is not None:
                data = msgspec.json.encode(_Checkpoint(list(self._entries.values()), self._spent))
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
        return _Checkpoint([], SpentVersions())
    data: bytes = system.cat_file(path)
    found = msgspec.json.decode(data, type=list[Entry] | _Checkpoint)
    return _Checkpoint(found, SpentVersions()) if isinstance(found, list) else found


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


@asynccontextmanager
async def lease(actor: Any, name: str, owner: str) -> AsyncIterator[Callable[[], bool]]:
    """Change an adapter while nobody else does. Raises AdapterLoadError, and ends the change, once this
    gateway has not renewed its right in time, whether the registry answers or not, because another one may
    change the adapter then; also if the registry hangs before. Gives a function that returns whether that has
    happened."""
    keeping: asyncio.Task[None] | None = None
    loop, right, begun = asyncio.get_running_loop(), asyncio.timeout(None), False
    try:
        async with right:
            while not begun:
                right.reschedule(loop.time() + LEASE_SECONDS)  # not later than it ends for the registry
                begun = await actor.begin.remote(name, owner)
            keeping = loop.create_task(_keep(actor, name, owner, right))
            yield right.expired
    except TimeoutError:
        if not right.expired():
            raise
        seconds = f"{LEASE_SECONDS:g} s"
        why = f"this gateway did not reach the registry for {seconds}, and another one may have changed it"
        if not begun:
            why = f"the fleet's registry has not answered for {seconds}; nothing was changed"
        raise AdapterLoadError(f"{why}; repeat the change", name=name, transient=True) from None
    finally:
        if keeping is not None:
            keeping.cancel()
        await _end(actor, name, owner)


async def _keep(actor: Any, name: str, owner: str, right: asyncio.Timeout) -> None:
    """Renew the right to change an adapter, for as long as that takes."""
    loop = asyncio.get_running_loop()
    while not right.expired():
        await asyncio.sleep(LEASE_SECONDS / 3)
        asked = loop.time()
        try:
            renewed = await actor.begin.remote(name, owner)
        except Exception as error:  # it is being restarted, and then knows of no right
            logger.warning("adapter %r: the registry does not answer: %s", name, type(error).__name__)
            continue
        if not right.expired():
            in_time = renewed and loop.time() <= (right.when() or 0.0)
            right.reschedule(asked + LEASE_SECONDS if in_time else loop.time())


async def _end(actor: Any, name: str, owner: str) -> None:
    """Let others change the adapter. If the registry does not hear of it, they wait until the right ends."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await actor.end.remote(name, owner)
    except Exception as error:
        logger.warning("adapter %r: the registry does not answer: %s", name, type(error).__name__)


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
