"""Has the choices and inputs of requests begin in turns."""

from __future__ import annotations

import asyncio

from aioengine.server.transport.turns import Turns


class Starts:
    """Lets a few choices begin in each pass of the event loop, and those of each owner in turn.

    One small request may ask for 128 choices, and each one that begins takes the loop a good part of a
    millisecond. So a few such requests at once would hold up everybody; and most of what a client has asked
    for that leaves at once is never begun.
    """

    def __init__(self) -> None:
        self._turns = Turns(is_busy=lambda: True)

    async def turn(self, owner: str | None) -> None:
        """Wait for a turn; at once if nobody else waits."""
        start = _Start(owner or "")
        self._turns.ask(start)
        await start.begun


class _Start:
    """A choice that waits for its turn."""

    def __init__(self, owner: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = self.loop.create_future()
        self.owner = owner
        self.has_asked = False

    @property
    def is_closing(self) -> bool:
        """Whether it is not waited for any more."""
        return self.begun.done()

    def take_turn(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)
