"""Where adapters come from that nobody registered: resolvers turn a name into a folder.

The engine asks its resolver when a request, or ``load_adapter`` without a path, names an adapter that is
not registered; the folder that it answers with is registered under that name and read as any other.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from aioengine.adapters.peft.folder import BIN_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, SAFETENSORS_FILE
from aioengine.adapters.read_threads import ReadThreads
from aioengine.config import format_bytes
from aioengine.errors import AdapterLoadError, AdapterNotFound, ConfigError

T = TypeVar("T")

WEIGHTS_FILES = (SAFETENSORS_FILE, BIN_FILE)
"""The first that is there is the one that is read."""
ADAPTER_FILES = (CONFIG_FILE, *WEIGHTS_FILES)
MAX_THREADS = 256
"""Look-ups of one resolver under way at once, with those that hang and nobody waits for any more. There is
one for each name at the most; further names are refused."""


class AdapterResolver(ABC):
    """Implement ``resolve``; it is called on the event loop, so it must not block (see
    :class:`BlockingResolver`)."""

    @abstractmethod
    async def resolve(self, name: str) -> str | os.PathLike[str]:
        """The folder of the adapter ``name``, in PEFT format.

        It is called once at a time for each name, however many requests wait, and is cancelled when none
        does any more, or when it has taken ``LoRAConfig.load_timeout`` seconds. Names obey the rule for
        adapter names, and have no empty, "." or ".." part between slashes. After an AdapterNotFound the next
        request asks again; after other errors in a row there are pauses.

        Raises AdapterNotFound for a name that it does not have, and AdapterLoadError if it cannot tell.
        """


class BlockingResolver(AdapterResolver):
    """Base of the resolvers that wait for disks and networks: ``find`` runs in a thread of its own, and
    one that hangs holds up nobody but who waits for it. When those who wait give up, it goes on, and who asks
    for the name again meanwhile gets its result."""

    def __init__(self) -> None:
        self._threads = ReadThreads("aioengine-resolve")
        self._under_way: dict[str, asyncio.Future[Path]] = {}

    @abstractmethod
    def find(self, name: str) -> Path:
        """As :meth:`AdapterResolver.resolve`, blocking."""

    async def resolve(self, name: str) -> Path:
        return await self._in_thread(name, name, lambda: self.find(name))

    async def _in_thread(self, name: str, what: str, find: Callable[[], Path]) -> Path:
        """``find()``, or what is under way for ``what``."""
        found = self._under_way.get(what)
        if found is None or found.get_loop() is not asyncio.get_running_loop():
            if len(self._under_way) >= MAX_THREADS:
                raise AdapterLoadError(
                    f"{len(self._under_way)} look-ups of adapters are under way (the oldest: "
                    f"{next(iter(self._under_way))}); if they hang, check what holds them up",
                    name=name,
                    transient=True,
                )
            found = self._under_way[what] = self._threads.start(find)
            found.add_done_callback(lambda found: self._ended(what, found))
        await asyncio.wait([found])  # unlike await, leaves it alone when we are cancelled
        return found.result()

    def _ended(self, what: str, found: asyncio.Future[Path]) -> None:
        if self._under_way.get(what) is found:
            del self._under_way[what]
        found.exception()  # seen, even if nobody waits


class ChainResolver(AdapterResolver):
    """Asks one resolver after the other; the first that has the adapter wins.

    An error that is not AdapterNotFound ends the search: whether that one had it cannot be known, and to
    go on could serve another adapter under this name.
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
    """The result of ``look_up``, in which the adapter ``name`` is sought. Raises AdapterLoadError if it takes
    longer; None: whatever it takes."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await look_up
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise AdapterLoadError(
            f"was not found within load_timeout={seconds:g} seconds: what its resolver asks hangs or is too "
            "slow; see to it, or raise LoRAConfig.load_timeout",
            name=name,
            transient=True,
        ) from error


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is safe as a relative path: no empty, "." or ".." part, no backslash, no NUL, and no
    longer than a path may be."""
    if len(name) > 4096 or "\\" in name or "\0" in name:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def too_large(file: str, size: int, max_bytes: int) -> str | None:
    """Why a file of an adapter is not fetched, if so. ``max_bytes`` is the bound on weights."""
    limit, todo = (
        (max_bytes, "; raise max_bytes if it is right") if file != CONFIG_FILE else (MAX_CONFIG_BYTES, "")
    )
    if size <= limit:
        return None
    return f"{file} has {format_bytes(size)}, and at most {format_bytes(limit)} are fetched{todo}"
