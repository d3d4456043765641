"""Where adapters come from that nobody registered: resolvers turn a name into a folder.

The engine asks its resolver when a request, or ``load_adapter`` without a path, names an adapter that is
not registered; the folder that it answers with is registered under that name and read as any other.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from aioengine.adapters.peft.folder import BIN_FILE, CONFIG_FILE, SAFETENSORS_FILE
from aioengine.adapters.read_threads import ReadThreads
from aioengine.errors import AdapterLoadError, AdapterNotFound, ConfigError

WEIGHTS_FILES = (SAFETENSORS_FILE, BIN_FILE)
"""The first that is there is the one that is read."""
ADAPTER_FILES = (CONFIG_FILE, *WEIGHTS_FILES)
MAX_ABANDONED = 32
"""A resolver with so many look-ups that were given up and still hang begins no others."""


class AdapterResolver(ABC):
    """Implement ``resolve``; it is called on the event loop, so it must not block (see
    :class:`BlockingResolver`)."""

    @abstractmethod
    async def resolve(self, name: str) -> str | os.PathLike[str]:
        """The folder of the adapter ``name``, in PEFT format.

        It is called once at a time for each name, however many requests wait, and may be cancelled when
        none does any more. Names obey the rule for adapter names, and have no empty, "." or ".." part
        between slashes. Nothing is remembered of a failure: the next request asks again.

        Raises AdapterNotFound for a name that it does not have, and AdapterLoadError if it cannot tell.
        """


class BlockingResolver(AdapterResolver):
    """Base of the resolvers that wait for disks and networks: ``find`` runs in a thread of its own, and
    one that hangs holds up nobody but who waits for it."""

    def __init__(self) -> None:
        self._threads = ReadThreads("aioengine-resolve")

    @abstractmethod
    def find(self, name: str) -> Path:
        """As :meth:`AdapterResolver.resolve`, blocking."""

    async def resolve(self, name: str) -> Path:
        return await self._in_thread(name, lambda: self.find(name))

    async def _in_thread(self, name: str, find: Callable[[], Path]) -> Path:
        if self._threads.abandoned >= MAX_ABANDONED:
            raise AdapterLoadError(
                f"{self._threads.abandoned} look-ups of adapters hang (the oldest: "
                f"{self._threads.oldest_abandoned}); check what holds them up",
                name=name,
                transient=True,
            )
        return await self._threads.run(name, find)


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


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is safe as a relative path: no empty, "." or ".." part, no backslash, no NUL."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and "\\" not in name and "\0" not in name
