"""Looks up adapters that are not registered yet, once for each name, however many requests wait."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Callable

from aioengine import errors, events
from aioengine.adapters.resolvers.base import AdapterResolver, is_plain_name, within
from aioengine.adapters.resolvers.sources import AdapterSources
from aioengine.core.adapters.failures import frameless
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.transfers import log_failure

logger = logging.getLogger("aioengine")

MAX_LOOKUPS = 128
"""Maximum look-ups under way at once. A tenant's next name waits while the tenant has as many look-ups under
way as there are free places. So a single tenant can take half of the places, and some always remain for
others."""

Tenant = str | None
Key = tuple[str, str | None]


class _Lookup:
    def __init__(self, key: Key) -> None:
        self.key = key
        self.task: asyncio.Task[str]
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the look-up may begin."""
        self.charged: Tenant = None
        """The tenant in whose turn it began."""
        self.waiting: dict[Tenant, int] = {}
        """Number of waiting callers, by tenant."""


class Resolution:
    """Shared look-ups.

    A look-up that no caller waits for any more is cancelled; results are not cached. No look-up may take
    longer than ``timeout`` seconds once it has begun. ``failed`` is called for each one that fails. Tenants
    take turns in starting look-ups; a name that several tenants wait for starts at the first turn of any of
    them.
    """

    def __init__(
        self, stepper: EngineLoop, resolver: AdapterResolver | None, timeout: float | None = None
    ) -> None:
        self._stepper = stepper
        self._resolver = resolver
        self._timeout = timeout
        self._sources = AdapterSources()
        self._lookups: dict[Key, _Lookup] = {}
        self._queues: OrderedDict[Tenant, OrderedDict[Key, _Lookup]] = OrderedDict()
        """Look-ups that each tenant waits for and that have not begun, in the order of turns; none is
        empty."""
        self._under_way: dict[Tenant, int] = {}
        self._closed: errors.AioEngineError | None = None

    def can_resolve(self, name: str) -> bool:
        """Whether the resolver may be asked for this name."""
        return self._resolver is not None and is_plain_name(name)

    async def locate(
        self,
        name: str,
        source: str | None = None,
        tenant: Tenant = None,
        check: Callable[[], None] = lambda: None,
    ) -> str:
        """Find the absolute path of the adapter's folder: the resolver's answer, or the local copy of
        ``source`` ("hf:owner/name", or a URL). ``check`` raises when the caller no longer needs it.

        Raises AdapterNotFound, AdapterLoadError, or another adapter error of the resolver's; any unexpected
        exception becomes an AdapterLoadError. ConfigError if an extra that is needed is not installed.
        """
        if self._closed is not None:
            raise self._closed
        key = name, source
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = _Lookup(key)
            ask = self._ask(lookup, name, source)
            lookup.task = asyncio.get_running_loop().create_task(ask, name=f"aioengine-resolve-{name}")
            lookup.task.add_done_callback(lambda task: self._ended(lookup))
        self._join(lookup, tenant)

        def ended() -> bool:
            check()
            return lookup.task.done() or self._closed is not None

        try:
            await self._stepper.until(ended, name)
        finally:
            self._leave(lookup, tenant)
        if self._closed is not None:
            raise self._closed
        if lookup.task.cancelled():
            raise errors.AdapterLoadError("its resolver was cancelled; try again", name=name, transient=True)
        return lookup.task.result()

    async def _ask(self, lookup: _Lookup, name: str, source: str | None) -> str:
        await lookup.turn
        try:
            if source is not None:
                path = self._sources.resolve_path(name, source)
                return str(await within(self._timeout, name, path))
            assert self._resolver is not None
            found: object = await within(self._timeout, name, self._resolver.resolve(name))
        except (errors.AdapterError, errors.ConfigError):
            raise
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._stepper.foreign.failed("resolver", self._resolver, error, f"adapter {name!r}")
            raise errors.AdapterLoadError(
                f"its resolver raised an unexpected {type(error).__name__}: {error}", name=name
            ) from error
        return _folder(name, found)

    def close(self, error: errors.AioEngineError) -> None:
        """Fail all current and later callers with ``error``."""
        self._closed = error
        self._queues.clear()
        for lookup in list(self._lookups.values()):
            lookup.task.cancel()
            self._stepper.ask_again(lookup.key[0])

    # Turns

    def _join(self, lookup: _Lookup, tenant: Tenant) -> None:
        lookup.waiting[tenant] = lookup.waiting.get(tenant, 0) + 1
        if not lookup.turn.done():
            self._queues.setdefault(tenant, OrderedDict())[lookup.key] = lookup
            self._begin_next()

    def _leave(self, lookup: _Lookup, tenant: Tenant) -> None:
        lookup.waiting[tenant] -= 1
        if lookup.waiting[tenant] == 0:
            del lookup.waiting[tenant]
            self._unqueue(lookup, tenant)
        if not lookup.waiting and not lookup.task.done():
            self._forget(lookup)
            lookup.task.cancel()

    def _begin_next(self) -> None:
        """Start as many look-ups as there is room for."""
        while True:
            free = MAX_LOOKUPS - sum(self._under_way.values())
            able = (item for item in self._queues.items() if self._under_way.get(item[0], 0) < free)
            tenant, queue = next(able, (None, None))
            if queue is None:
                return
            lookup = next(iter(queue.values()))
            for waiter in lookup.waiting:
                self._unqueue(lookup, waiter)
            if tenant in self._queues:
                self._queues.move_to_end(tenant)
            lookup.charged = tenant
            self._under_way[tenant] = self._under_way.get(tenant, 0) + 1
            lookup.turn.set_result(None)

    def _unqueue(self, lookup: _Lookup, tenant: Tenant) -> None:
        queue = self._queues.get(tenant)
        if queue is not None and queue.get(lookup.key) is lookup:
            del queue[lookup.key]
            if not queue:
                del self._queues[tenant]

    def _ended(self, lookup: _Lookup) -> None:
        self._forget(lookup)
        if lookup.turn.done() and not lookup.turn.cancelled():
            self._under_way[lookup.charged] -= 1
            if self._under_way[lookup.charged] == 0:
                del self._under_way[lookup.charged]
        for tenant in lookup.waiting:  # it was cancelled before its turn
            self._unqueue(lookup, tenant)
        error = (
            None if lookup.task.cancelled() else lookup.task.exception()
        )  # read, even if nobody waits: asyncio would log it
        if isinstance(error, (errors.AdapterError, errors.ConfigError)) and not isinstance(
            error, errors.AdapterNotFound
        ):
            self._stepper.report(_failure(lookup.key[0], error))
        if isinstance(error, (errors.AdapterInvalid, errors.AdapterLoadError)):
            name, names = lookup.key[0], self._stepper.core.residency.names
            names.fail(name, frameless(error), asyncio.get_running_loop().time())
            log_failure(names.failures(name), name, error)
        self._stepper.ask_again(lookup.key[0])
        self._begin_next()

    def _forget(self, lookup: _Lookup) -> None:
        if self._lookups.get(lookup.key) is lookup:
            del self._lookups[lookup.key]


def _failure(name: str, error: errors.AdapterError | errors.ConfigError) -> events.ResolverFailed:
    reason: events.LoadFailure = "internal" if isinstance(error, errors.ConfigError) else "io"
    if isinstance(error, errors.AdapterInvalid):
        reason = "invalid"
    return events.ResolverFailed(
        time=asyncio.get_running_loop().time(), adapter=name, reason=reason, error=error
    )


def _folder(name: str, found: object) -> str:
    path = os.fspath(found) if isinstance(found, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise errors.AdapterLoadError(
            f"its resolver must return a folder's path, as str or os.PathLike, not {found!r}", name=name
        )
    return os.path.abspath(path)
