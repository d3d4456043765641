"""Where adapters are that are not registered yet: asked once for each name, however many wait."""

from __future__ import annotations

import asyncio
import logging
import os

from aioengine.adapters.resolvers.base import AdapterResolver, is_plain_name
from aioengine.adapters.resolvers.hub import HubResolver
from aioengine.errors import AdapterError, AdapterLoadError, AioEngineError, ConfigError

logger = logging.getLogger("aioengine")

MAX_LOOKUPS = 64
"""Look-ups under way at once; further names wait for one to end."""


class _Lookup:
    def __init__(self, task: asyncio.Task[str]) -> None:
        self.task = task
        self.waiting = 0


class Resolution:
    """Shares look-ups. A look-up that nobody waits for any more is cancelled; nothing is remembered."""

    def __init__(self, resolver: AdapterResolver | None) -> None:
        self._resolver = resolver
        self._hub: HubResolver | None = None
        self._lookups: dict[tuple[str, str | None], _Lookup] = {}
        self._room = asyncio.Semaphore(MAX_LOOKUPS)
        self._closed: AioEngineError | None = None

    def can_resolve(self, name: str) -> bool:
        """Whether the resolver may be asked for this name."""
        return self._resolver is not None and is_plain_name(name)

    async def locate(self, name: str, source: str | None = None) -> str:
        """The absolute path of the adapter's folder: what the resolver answers, or the local copy of
        ``source``, a path that begins with "hf:".

        Raises AdapterNotFound, AdapterLoadError, or another adapter error of the resolver's; what it should
        not raise becomes an AdapterLoadError. ConfigError if an extra that is needed is not installed.
        """
        if self._closed is not None:
            raise self._closed
        key = name, source
        lookup = self._lookups.get(key)
        if lookup is None:
            ask = self._ask(name, source)
            task = asyncio.get_running_loop().create_task(ask, name=f"aioengine-resolve-{name}")
            lookup = self._lookups[key] = _Lookup(task)
            task.add_done_callback(lambda task: self._ended(key, task))
        lookup.waiting += 1
        try:
            await asyncio.wait([lookup.task])  # unlike await, leaves the task alone when we are cancelled
        finally:
            lookup.waiting -= 1
            if lookup.waiting == 0 and not lookup.task.done():
                self._forget(key, lookup.task)
                lookup.task.cancel()
        if self._closed is not None:
            raise self._closed
        if lookup.task.cancelled():
            raise AdapterLoadError("its resolver was cancelled; try again", name=name, transient=True)
        return lookup.task.result()

    async def _ask(self, name: str, source: str | None) -> str:
        async with self._room:
            try:
                if source is not None:
                    return str(await self._from_hub().resolve_path(name, source))
                assert self._resolver is not None
                found: object = await self._resolver.resolve(name)
            except (AdapterError, ConfigError):
                raise
            except Exception as error:
                logger.exception("the resolver failed unexpectedly on adapter %r", name)
                raise AdapterLoadError(
                    f"its resolver raised an unexpected {type(error).__name__}: {error}", name=name
                ) from error
        return _folder(name, found)

    def close(self, error: AioEngineError) -> None:
        """Whoever waits, or asks later, gets ``error``."""
        self._closed = error
        for lookup in self._lookups.values():
            lookup.task.cancel()

    def _from_hub(self) -> HubResolver:
        if self._hub is None:
            self._hub = HubResolver()
        return self._hub

    def _ended(self, key: tuple[str, str | None], task: asyncio.Task[str]) -> None:
        self._forget(key, task)
        if not task.cancelled():
            task.exception()  # seen, even if nobody waits

    def _forget(self, key: tuple[str, str | None], task: asyncio.Task[str]) -> None:
        lookup = self._lookups.get(key)
        if lookup is not None and lookup.task is task:
            del self._lookups[key]


def _folder(name: str, found: object) -> str:
    path = os.fspath(found) if isinstance(found, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise AdapterLoadError(
            f"its resolver must return a folder's path, as str or os.PathLike, not {found!r}", name=name
        )
    return os.path.abspath(path)
