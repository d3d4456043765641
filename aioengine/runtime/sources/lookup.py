"""Looks up adapters that are not registered yet, once for each name, however many requests wait."""

from __future__ import annotations

import asyncio
import os

from aioengine import errors, events
from aioengine.adapters.resolvers.base import AdapterResolver, SharedLookups, within
from aioengine.adapters.resolvers.sources import fetch_source
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.transfers import log_failure, reason_of, unexpected
from aioengine.tasks import SharedWork, WorkInTurns

MAX_LOOKUPS = 128
MAX_OF_A_TENANT = 32
"""Look-ups under way at once, of all tenants and of one."""


class Lookups:
    """Shared look-ups, each of which may take ``timeout`` seconds once it has begun. One that no caller waits
    for any more is cancelled; results are not cached. Tenants take turns, but not for new versions."""

    def __init__(
        self, loop: EngineLoop, resolver: AdapterResolver | None, timeout: float | None = None
    ) -> None:
        self._loop = loop
        self._names = loop.core.residency.names
        self.resolver = resolver
        """It is asked for names that nobody has registered, if there is one."""
        self._timeout = timeout
        self._fetches = SharedLookups()
        self._finds = WorkInTurns[str, None](MAX_LOOKUPS, MAX_OF_A_TENANT)
        self._asks = SharedWork[tuple[str, str], str]()
        """By name and source."""

    async def find(self, name: str, tenant: str | None) -> None:
        """Find a name that has no version, and register what was found. Raises as :meth:`locate`."""
        await self._finds.result(tenant, name, lambda: self._register(name))

    async def _register(self, name: str) -> None:
        known = self._names.of(name)
        source = known.source or ""
        if known.current is None:
            where = await self.locate(name, source)
        if known.current is not None:  # found for another tenant
            return
        if source and known.source != source:  # unloaded meanwhile
            raise self._names.not_found(name)
        known.register(where, self._loop.now(), source=source)
        self._loop.wake()

    async def locate(self, name: str, source: str) -> str:
        """Find the absolute path of the adapter's folder: the local copy of ``source`` ("hf:owner/name", or a
        URL) or, for "", the resolver's answer. Raises AdapterNotFound, AdapterLoadError, or another adapter
        error of the resolver's; any unexpected exception becomes an AdapterLoadError. ConfigError if an extra
        that is needed is not installed."""
        return await self._asks.result((name, source), lambda: self._ask(name, source))

    async def _ask(self, name: str, source: str) -> str:
        """Ask, and tell of failures."""
        try:
            if source:
                fetch = self._fetches.run(name, source, lambda: fetch_source(name, source))
                return str(await within(self._timeout, name, fetch))
            assert self.resolver is not None
            return _folder(name, await within(self._timeout, name, self.resolver.resolve(name)))
        except errors.AdapterNotFound:
            raise
        except (errors.AdapterError, errors.ConfigError) as error:
            self._failed(name, error)
            raise
        except BaseException as error:  # anything, of somebody else's code
            task = asyncio.current_task()
            if isinstance(error, KeyboardInterrupt) or (task is not None and task.cancelling()):
                raise
            failure = unexpected(error, "its resolver raised an unexpected ", name)
            self._failed(name, failure)
            raise failure from error

    def _failed(self, name: str, error: errors.AdapterError | errors.ConfigError) -> None:
        now = self._loop.now()
        self._loop.report(events.ResolverFailed(time=now, adapter=name, reason=reason_of(error), error=error))
        if isinstance(error, (errors.AdapterInvalid, errors.AdapterLoadError)):
            known = self._names.of(name)
            known.fail(errors.frameless(error), now)
            log_failure(known.failures, name, error)

    def close(self, error: errors.AioEngineError) -> None:
        """Fail all current and later callers with ``error``."""
        self._finds.shared.close(error)
        self._asks.close(error)


def _folder(name: str, found: object) -> str:
    path = os.fspath(found) if isinstance(found, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise errors.AdapterLoadError(
            f"its resolver must return a folder's path, as str or os.PathLike, not {found!r}", name=name
        )
    return os.path.abspath(path)
