"""A lock for each name, in place of the registry's rights to change an adapter."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AbstractAsyncContextManager


class NameLocks:
    def __init__(self) -> None:
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def hold(self, name: str) -> AbstractAsyncContextManager[None]:
        return self._locks[name]
