"""A queue in which tenants take turns."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Queue that is first in, first out for each tenant, and round robin between tenants."""

    def __init__(self) -> None:
        self._of: OrderedDict[str | None, deque[T]] = OrderedDict()
        self._filled = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._of)

    def count(self, tenant: str | None) -> int:
        """Return the number of the tenant's waiting items."""
        return len(self._of.get(tenant, ()))

    def put(self, tenant: str | None, item: T) -> None:
        self._of.setdefault(tenant, deque()).append(item)
        self._filled.set()

    def discard(self, tenant: str | None, item: T) -> None:
        """Remove an item, if it is there."""
        items = self._of.get(tenant, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._of[tenant]

    async def get(self) -> T:
        """Return the next item; waits for one."""
        while not self._of:
            self._filled.clear()
            await self._filled.wait()
        tenant, items = next(iter(self._of.items()))
        item = items.popleft()
        if items:
            self._of.move_to_end(tenant)
        else:
            del self._of[tenant]
        return item
