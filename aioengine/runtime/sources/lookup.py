"""Looks up adapters that are not registered yet, once for each name, however many requests wait."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from functools import partial

from aioengine import errors, events
from aioengine.adapters.resolvers.base import AdapterResolver, is_plain_name, within
from aioengine.adapters.resolvers.sources import AdapterSources
from aioengine.core.adapters.name import frameless
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.transfers import log_failure, reason_of

MAX_LOOKUPS = 128
"""Maximum look-ups under way at once. A tenant's next name waits while the tenant has as many look-ups under
way as there are free places. So a single tenant can take half of the places, and some always remain for
others."""

Tenant = str | None
Key = tuple[str, str]
"""A name, and what is looked up for it."""


class _Lookup:
    def __init__(self, key: Key) -> None:
        self.key = key
        self.task: asyncio.Task[str] | None = None
        """None until its turn."""
        self.callers = 0

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()


class Lookups:
    """Shared look-ups, each of which may take ``timeout`` seconds once it has begun. One that no caller waits
    for any more is cancelled; results are not cached. Tenants take turns in starting look-ups; a name that
    several wait for starts at the first turn of any of them."""

    def __init__(
        self, loop: EngineLoop, resolver: AdapterResolver | None, timeout: float | None = None
    ) -> None:
        self._loop = loop
        self._resolver = resolver
        self._timeout = timeout
        self._sources = AdapterSources()
        self._lookups: dict[Key, _Lookup] = {}
        self._queues: dict[Tenant, dict[Key, _Lookup]] = {}
        """What each tenant has asked for, in the order of turns. Some may have begun, or be given up."""
        self._under_way: Counter[Tenant] = Counter()
        self._closed: errors.AioEngineError | None = None

    def can_resolve(self, name: str) -> bool:
        """Whether the resolver may be asked for this name."""
        return self._resolver is not None and is_plain_name(name)

    async def locate(
        self,
        name: str,
        source: str = "",
        tenant: Tenant = None,
        check: Callable[[], None] = lambda: None,
    ) -> str:
        """Find the absolute path of the adapter's folder: the resolver's answer, or the local copy of
        ``source`` ("hf:owner/name", or a URL). ``check`` raises when the caller no longer needs it.

        Raises AdapterNotFound, AdapterLoadError, or another adapter error of the resolver's; any unexpected
        exception becomes an AdapterLoadError. ConfigError if an extra that is needed is not installed.
        """
        self._check_open()
        key = name, source
        lookup = self._lookups.setdefault(key, _Lookup(key))
        lookup.callers += 1
        if lookup.task is None:
            self._queues.setdefault(tenant, {})[key] = lookup
            self._begin_next()

        def ended() -> bool:
            check()
            return lookup.done or self._closed is not None

        try:
            await self._loop.until(ended, name)
        finally:
            lookup.callers -= 1
            if not lookup.callers and not lookup.done:
                self._forget(lookup)
                self._queues.get(tenant, {}).pop(key, None)
                if lookup.task is not None:
                    lookup.task.cancel()
        self._check_open()
        assert lookup.task is not None
        if lookup.task.cancelled():
            raise errors.AdapterLoadError("its resolver was cancelled; try again", name=name, transient=True)
        return lookup.task.result()

    async def _ask(self, name: str, source: str) -> str:
        try:
            if source:
                return str(await within(self._timeout, name, self._sources.resolve_path(name, source)))
            assert self._resolver is not None
            found: object = await within(self._timeout, name, self._resolver.resolve(name))
        except (errors.AdapterError, errors.ConfigError, asyncio.CancelledError):
            raise
        except BaseException as error:
            self._loop.foreign.failed("resolver", self._resolver, error, f"adapter {name!r}")
            raise errors.AdapterLoadError(
                f"its resolver raised an unexpected {type(error).__name__}: {error}", name=name
            ) from error
        return _folder(name, found)

    def close(self, error: errors.AioEngineError) -> None:
        """Fail all current and later callers with ``error``."""
        self._closed = error
        self._queues.clear()
        for lookup in list(self._lookups.values()):
            if lookup.task is not None:
                lookup.task.cancel()
            self._loop.ask_again(lookup.key[0])

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed

    # Turns

    def _begin_next(self) -> None:
        """Start as many look-ups as there is room for."""
        while True:
            free = MAX_LOOKUPS - self._under_way.total()
            tenant, queue = next(
                (item for item in self._queues.items() if self._under_way[item[0]] < free), (None, None)
            )
            if queue is None:
                return
            del self._queues[tenant]
            lookup = queue.pop(next(iter(queue))) if queue else None
            if queue:
                self._queues[tenant] = queue  # the last one in turn
            if lookup is not None and lookup.callers and lookup.task is None:
                self._under_way[tenant] += 1
                name = f"aioengine-resolve-{lookup.key[0]}"
                lookup.task = asyncio.get_running_loop().create_task(self._ask(*lookup.key), name=name)
                lookup.task.add_done_callback(partial(self._ended, lookup, tenant))

    def _ended(self, lookup: _Lookup, tenant: Tenant, task: asyncio.Task[str]) -> None:
        self._forget(lookup)
        self._under_way -= Counter({tenant: 1})
        name, now = lookup.key[0], asyncio.get_running_loop().time()
        # Read even if nobody waits, because asyncio would log it.
        error = None if task.cancelled() else task.exception()
        if isinstance(error, (errors.AdapterError, errors.ConfigError)) and not isinstance(
            error, errors.AdapterNotFound
        ):
            reason = reason_of(error)
            self._loop.report(events.ResolverFailed(time=now, adapter=name, reason=reason, error=error))
        if isinstance(error, (errors.AdapterInvalid, errors.AdapterLoadError)):
            known = self._loop.core.residency.names.of(name)
            known.fail(frameless(error), now)
            log_failure(known.failures, name, error)
        self._loop.ask_again(name)
        self._begin_next()

    def _forget(self, lookup: _Lookup) -> None:
        if self._lookups.get(lookup.key) is lookup:
            del self._lookups[lookup.key]


def _folder(name: str, found: object) -> str:
    path = os.fspath(found) if isinstance(found, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise errors.AdapterLoadError(
            f"its resolver must return a folder's path, as str or os.PathLike, not {found!r}", name=name
        )
    return os.path.abspath(path)
