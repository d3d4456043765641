"""Grammars that wait to be compiled."""

from __future__ import annotations

import asyncio

from aioengine.errors import AioEngineError
from aioengine.grammars.fair_queue import FairQueue
from aioengine.grammars.matching import Grammar

Outcome = Grammar | AioEngineError
"""Outcome of a compile."""


class Job:
    """A text to compile, for the requests that wait for it. Created and used on one loop."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.waiters: dict[str | None, int] = {}
        """Number of waiting requests by tenant."""
        self.queue: FairQueue[Job] | None = None
        """The queue in which the job waits for its turn, once for each tenant."""
        self.attempt: asyncio.Task[Outcome] | None = None

    def enqueue(self, queue: FairQueue[Job]) -> None:
        """Put the job into a queue, once for each tenant that waits."""
        self.queue = queue
        for tenant in self.waiters:
            queue.put(tenant, self)

    def join(self, tenant: str | None) -> None:
        """Note that one more request of a tenant waits for the job."""
        if tenant not in self.waiters and self.queue is not None:
            self.queue.put(tenant, self)
        self.waiters[tenant] = self.waiters.get(tenant, 0) + 1

    def leave(self, tenant: str | None) -> None:
        """Note that one of these requests has stopped waiting."""
        self.waiters[tenant] -= 1
        if self.waiters[tenant] == 0:
            del self.waiters[tenant]
            if self.queue is not None:
                self.queue.discard(tenant, self)

    def begin(self) -> None:
        """Take the job out of its queue, because it is its turn."""
        queue, self.queue = self.queue, None
        assert queue is not None
        for tenant in self.waiters:
            queue.discard(tenant, self)
