"""AdapterNames: the version of an adapter that a name in a request stands for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from aioengine.adapters.names import NAME_RULE
from aioengine.adapters.resolvers.base import AdapterResolver
from aioengine.core.adapters.failures import frameless
from aioengine.core.state import AdapterEntry, where_is
from aioengine.errors import AdapterError, AdapterNotFound
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.sources.lookup import Resolution
from aioengine.runtime.sources.mixes import Mixes
from aioengine.schedulers.policy import Location

Asked = str | Mapping[str, float]
"""An adapter's name, or names with weights."""


class AdapterNames:
    """Versions of adapters by name: registered ones, those that a look-up finds, and mixes."""

    def __init__(
        self, loop: EngineLoop, resolver: AdapterResolver | None, resolve_timeout: float | None
    ) -> None:
        self._loop = loop
        self._residency = loop.core.residency
        self.lookups = Resolution(loop, resolver, resolve_timeout)
        self.table = loop.core.residency.names
        self._readers: Counter[int] = Counter()
        """Number of callers that wait for a version to be read, by uid."""
        self.mixes = Mixes(self._residency, self.acquire, self._read_part)

    def is_registered(self, name: str) -> bool:
        return name in self.table.current

    def source(self, name: str) -> str | None:
        """Return what is looked up for a name; None: itself, by the resolver."""
        known = self.table.find(name)
        return None if known is None else known.source

    def current(self, adapter: Asked) -> AdapterEntry | None:
        """Return the current version of a registered name; None for anything else."""
        return self.table.current.get(adapter) if isinstance(adapter, str) else None

    def find(self, name: str) -> AdapterEntry:
        """Return the current version. Raises AdapterNotFound."""
        entry = self.table.current.get(name)
        if entry is None:
            raise self._not_found(name)
        return entry

    # What a request asks for

    def check_wanted(self, adapter: Asked) -> Sequence[str]:
        """Check what a request asks for before any work is done for it. Returns the names of the adapters
        that it counts for in bounds on waiting requests.

        Raises AdapterNotFound for a name that is neither registered nor resolvable. For an adapter that has
        failed more than once in a row, raises its last error again for a while."""
        names = [adapter] if isinstance(adapter, str) else list(adapter)
        for name in names:
            self.check_known(name)
            entry = self.table.current.get(name)
            if entry is None or entry.location is Location.DISK:
                self.table.check_worth_a_try(name, _now())
        return tuple(dict.fromkeys(name.partition("@")[0] for name in names))

    async def acquire_wanted(self, adapter: Asked, tenant: str | None) -> tuple[AdapterEntry, float]:
        """Return the version, or the mix, that a request asks for, and what it is multiplied by."""
        if isinstance(adapter, str):
            return await self.acquire(adapter, tenant), 1.0
        return await self.mixes.acquire(adapter, tenant, _now())

    def where(self, adapter: Asked) -> str:
        """Name what a request asks for and where it is, for the message of an error."""
        entry = self.current(adapter)
        return f" for adapter {adapter!r} (not looked up yet)" if entry is None else where_is(entry)

    def check_lives(self, entry: AdapterEntry) -> None:
        """Raise AdapterNotFound if an acquired version has been removed since."""
        if entry.uid not in self._residency.entries:
            raise AdapterNotFound("it was unloaded while the request was prepared", name=entry.label)

    def check_known(self, name: str) -> None:
        """Raise AdapterNotFound for a name that is neither registered nor resolvable."""
        known = self.table.find(name)
        if known is not None and (known.current or known.looked_up):
            return
        if isinstance(name, str) and "@" in name:
            label = name.partition("@")[0]
            if self.is_registered(label):
                self._version(name)
            else:
                self.check_known(label)
            return
        good = isinstance(name, str) and NAME_RULE.fullmatch(name) is not None
        if not good or not self.lookups.can_resolve(name):
            raise self._not_found(name)

    # Versions

    async def acquire(
        self, name: str, tenant: str | None = None, check: Callable[[], None] = lambda: None
    ) -> AdapterEntry:
        """Return the current version; if there is none, register what the resolver finds for ``tenant``.

        ``check`` is an argument of :meth:`Resolution.locate`, whose errors it raises.
        """
        if self.is_registered(name):
            return self.find(name)
        if "@" in name:
            await self.acquire(name.partition("@")[0], tenant, check)
            return self._version(name)
        self.check_known(name)
        source = self.source(name)
        where = await self.lookups.locate(name, source, tenant, check)
        if self.is_registered(name):  # another caller that waited was first
            return self.find(name)
        if source is not None and self.source(name) != source:  # unloaded meanwhile
            raise self._not_found(name)
        self.table.of(name).look_up(source)
        return self.publish(name, where, found=True)

    def publish(self, name: str, where: str, *, found: bool = False) -> AdapterEntry:
        """Register a folder under a name that is free."""
        entry = self._residency.declare(name, where, found=found)
        self._residency.publish(entry, _now())
        self._loop.wake()
        return entry

    async def read(
        self,
        entry: AdapterEntry,
        *,
        now: bool,
        pin: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Have a version read, and wait until it is in the CPU cache or, without ``now``, until it has ever
        been read, or was replaced. ``check`` raises when the caller no longer needs it.

        When the last caller leaves, whether it was read or they gave up, nobody wants it any more.
        """

        def is_read() -> bool:
            if entry.location in (Location.CPU, Location.SLOT) if now else (entry.digest or entry.retired):
                return True
            check()
            if entry.error is not None:
                raise frameless(entry.error)
            return False

        if not now and (entry.digest or entry.retired):
            return
        self._readers[entry.uid] += 1
        try:
            if now or entry.wanted_since is None:
                self._residency.want(entry, _now(), pin=pin)
                self._loop.wake()
            await self._loop.until(is_read, entry.label)
        finally:
            self._readers -= Counter({entry.uid: 1})
            if entry.uid not in self._readers and not entry.pinned:
                # A pinned adapter is read again after a loss of the device.
                self._residency.forget_want(entry)

    async def _read_part(self, entry: AdapterEntry) -> None:
        """Wait until a part of a mix has been read, if it never was."""
        try:
            await self.read(entry, now=False)
        except AdapterError:
            if isinstance(entry.error, AdapterError):
                self.table.fail(entry.label, entry.error, _now())
            raise

    def _version(self, name: str) -> AdapterEntry:
        """Return the version that "name@version" stands for: the current one, or one that was replaced and
        still has requests. Raises AdapterNotFound."""
        label, _, version = name.partition("@")
        current = self.find(label)
        if version == str(current.version):
            return current
        entry = self.table.known.get(name)
        if entry is None:
            raise AdapterNotFound(
                f"this version is gone: the current one is {current.version}, and a replaced one goes when "
                "its last request has ended",
                name=name,
            )
        return entry

    def _not_found(self, name: str) -> AdapterNotFound:
        current = self.table.current
        known = ", ".join(islice(current, 20)) or "none"
        more = f" and {len(current) - 20} more" if len(current) > 20 else ""
        return AdapterNotFound(
            f"not registered; load it with load_adapter or register_adapter (known: {known}{more})", name=name
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
