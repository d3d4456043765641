"""Resolvers turn the name of an adapter that nobody registered into a local folder.

The engine asks its resolver when a request, or ``load_adapter`` without a path, names an adapter that is
not registered; the folder that it answers with is registered under that name and read as any other.
"""

from __future__ import annotations

import asyncio
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from aioengine.adapters.peft.folder import CONFIG_FILE, MAX_CONFIG_BYTES, SAFETENSORS_FILE, invalid
from aioengine.adapters.read_threads import start_read
from aioengine.checks import format_bytes
from aioengine.errors import AdapterLoadError, AdapterNotFound, ConfigError

T = TypeVar("T")

ADAPTER_FILES = (CONFIG_FILE, SAFETENSORS_FILE)
_URL_PART = re.compile(r"[\w.:+@=,~-]+(?: +[\w.:+@=,~-]+)*")
MAX_WEIGHTS_BYTES = 4 << 30
"""The largest weights file that is fetched."""
MAX_THREADS = 256
"""Maximum look-ups of one resolver at once, abandoned ones included. There is at most one for each name;
further names are refused."""


class AdapterResolver(ABC):
    """Base of all resolvers. Implement ``resolve``; it is called on the event loop, so
    it must not block (see :class:`BlockingResolver`)."""

    @abstractmethod
    async def resolve(self, name: str) -> str | os.PathLike[str]:
        """Return the folder of the adapter ``name``, in PEFT format.

        For each name one call runs at a time, however many requests wait for it. It is cancelled when no
        request waits any more, or after ``LoRAConfig.load_timeout`` seconds. Names obey the rule for adapter
        names, and have no empty, "." or ".." part between slashes. After an AdapterNotFound the next request
        asks again. After several other errors in a row there are pauses.

        Raises AdapterNotFound if there is no adapter of this name, and AdapterLoadError if that cannot be
        found out.
        """


class SharedLookups:
    """Blocking look-ups, each in a thread of its own, so that one that hangs delays only the requests that
    wait for it. If they give up, the look-up goes on, and a later request for the same gets its result."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[Path]] = {}

    async def run(self, name: str, what: str, find: Callable[[], Path]) -> Path:
        """Run ``find()`` for the adapter ``name``, or join the look-up that is under way for ``what``."""
        found = self._under_way.get(what)
        if found is None or found.get_loop() is not asyncio.get_running_loop():
            if len(self._under_way) >= MAX_THREADS:
                raise AdapterLoadError(
                    f"{len(self._under_way)} look-ups of adapters are under way (the oldest: "
                    f"{next(iter(self._under_way))}); if they hang, check what holds them up",
                    name=name,
                    transient=True,
                )
            found = self._under_way[what] = start_read("aioengine-resolve", find)
            found.add_done_callback(lambda _: self._under_way.pop(what, None))
        return await asyncio.shield(found)


class BlockingResolver(AdapterResolver):
    """Base of resolvers that wait for disks and networks. ``find`` runs in a thread
    (:class:`SharedLookups`)."""

    def __init__(self) -> None:
        self._lookups = SharedLookups()

    @abstractmethod
    def find(self, name: str) -> Path:
        """Find an adapter as :meth:`AdapterResolver.resolve` does, but blocking."""

    async def resolve(self, name: str) -> Path:
        return await self._lookups.run(name, name, lambda: self.find(name))


class ChainResolver(AdapterResolver):
    """Asks one resolver after the other; the first that has the adapter wins.

    Any error but AdapterNotFound ends the search: it is unknown whether that resolver has the adapter, and
    going on could serve a different adapter under this name.
    """

    def __init__(self, resolvers: Sequence[AdapterResolver]) -> None:
        for resolver in resolvers:
            if not isinstance(resolver, AdapterResolver):
                raise ConfigError(f"resolvers={list(resolvers)!r}: each must be an AdapterResolver")
        self.resolvers = tuple(resolvers)

    async def resolve(self, name: str) -> str | os.PathLike[str]:
        for resolver in self.resolvers:
            try:
                return await resolver.resolve(name)
            except AdapterNotFound:
                continue
        raise AdapterNotFound(f"none of {len(self.resolvers)} resolvers has it", name=name)


async def within(seconds: float | None, name: str, look_up: Awaitable[T]) -> T:
    """Await ``look_up``, which searches for the adapter ``name``. Raises AdapterLoadError after ``seconds``;
    None waits for ever."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await look_up
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise AdapterLoadError(
            f"was not found within load_timeout={seconds:g} seconds: what its resolver asks hangs or is too "
            "slow; repair that, or raise LoRAConfig.load_timeout",
            name=name,
            transient=True,
        ) from error


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is safe as a relative path: no empty, "." or ".." part, no backslash, no NUL, and no
    longer than a path may be."""
    if len(name) > 4096 or "\\" in name or "\0" in name:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def is_plain_path(path: str) -> bool:
    """Whether ``path`` is safe below a URL, too: there "%2e%2e" is "..", "?" and "#" end the path, tabs and
    line ends are dropped, and fsspec splits at "::"."""
    return is_plain_name(path) and "::" not in path and all(map(_URL_PART.fullmatch, path.split("/")))


def check_size(file: str, size: int) -> None:
    """Raise AdapterInvalid if a file of an adapter is too large to fetch."""
    limit, todo = MAX_WEIGHTS_BYTES, "; copy it to this machine, and load the folder"
    if file == CONFIG_FILE:
        limit, todo = MAX_CONFIG_BYTES, ""
    if size > limit:
        invalid(f"{file} has {format_bytes(size)}, and at most {format_bytes(limit)} are fetched{todo}")
