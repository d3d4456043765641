"""Lets callers wait for events in the core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aioengine import events
from aioengine.errors import AioEngineError

Condition = Callable[[], bool]


class Waits:
    """Checks each condition again when an event may have made it true.

    A condition concerns one adapter, by name, or under None the requests that have not ended. So the cost of
    an event grows with the callers that wait for its adapter, not with all callers.
    """

    HEARD = (events.AdapterEvent, events.RequestEnded)

    def __init__(self) -> None:
        self._waiting: dict[str | None, dict[asyncio.Future[None], Condition]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def until(self, happened: Condition, adapter: str | None) -> None:
        """Wait until ``happened()`` is true; it is false now. Raises what it raises, or the error given to
        :meth:`fail`."""
        waiting = self._waiting.setdefault(adapter, {})
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting[done] = happened
        try:
            await done
        finally:
            del waiting[done]
            if not waiting and self._waiting.get(adapter) is waiting:
                del self._waiting[adapter]
            del done  # its error has this frame: leave no cycle, which would keep all callers' frames

    def __call__(self, event: events.Event) -> None:
        """Check the callers that this event may concern."""
        if isinstance(event, events.AdapterPinned):  # a pin may shut out any other adapter
            for adapter in list(self._waiting):
                self.ask(adapter)
        else:
            self.ask(event.adapter if isinstance(event, events.AdapterEvent) else None)

    def ask(self, adapter: str | None) -> None:
        """Check the callers that wait for something about this adapter."""
        for done, happened in list(self._waiting.get(adapter, {}).items()):
            if done.done():
                continue
            try:
                if happened():
                    done.set_result(None)
            except Exception as error:
                done.set_exception(error.with_traceback(None))  # for it has this frame

    def fail(self, error: AioEngineError) -> None:
        """Fail all callers."""
        for waiting in self._waiting.values():
            for done in waiting:
                if not done.done():
                    done.set_exception(error)
