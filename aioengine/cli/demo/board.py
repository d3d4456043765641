"""Board: the demo's requests and swaps, as the engine's events report them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from aioengine import events
from aioengine.cli.demo.jobs import Job

ARRIVAL_SECONDS = 0.15
"""Seconds between the arrivals of two requests."""

State = Literal["soon", "waiting", "running", "done", "failed"]


@dataclass
class Row:
    """One request and its progress. Times are seconds on the loop's clock."""

    job: Job
    state: State = "soon"
    slot: int | None = None
    replica: int | None = None
    """Replica on which it runs, in a fleet."""
    text: str = ""
    tokens: int = 0
    ttft: float | None = None
    admitted: float | None = None
    ended: float | None = None
    passed: bool | None = None
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Time in the batch, once it has ended."""
        if self.admitted is None or self.ended is None:
            return 0.0
        return self.ended - self.admitted


class Board:
    """An event listener that keeps one row for each request and the latest adapter moves.

    ``say`` is called with a line of text for each event that is shown.
    """

    def __init__(self, jobs: list[Job], say: Callable[[str], None]) -> None:
        self.rows = {job.id: Row(job) for job in jobs}
        self.moves: deque[str] = deque(maxlen=3)
        self.say = say
        self.begun = time.perf_counter()
        """When the first request arrived."""

    async def ask_all(self, ask: Callable[[Row], Awaitable[None]]) -> None:
        """Call ``ask`` for all rows, which arrive one after the other, and wait for all."""

        async def arrive(row: Row, delay: float) -> None:
            await asyncio.sleep(delay)
            await ask(row)

        self.begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, row in enumerate(self.rows.values()):
                group.create_task(arrive(row, index * ARRIVAL_SECONDS))

    @property
    def all_finished(self) -> bool:
        return all(row.state == "done" for row in self.rows.values())

    def handle(self, event: events.Event) -> None:
        """Take in an event; this is a listener for ``engine.add_listener``."""
        match event:
            case events.RequestAdded(request_id=key):
                self.rows[key].state = "waiting"
            case events.RequestAdmitted(request_id=key):
                self._admitted(self.rows[key], event)
            case events.FirstToken(request_id=key):
                self.rows[key].ttft = event.seconds
            case events.RequestPreempted(request_id=key):
                self.rows[key].state = "waiting"
            case events.RequestEnded(request_id=key):
                self._ended(self.rows[key], event)
            case events.AdapterLoaded():
                self.moved(f"{event.adapter}: disk -> CPU ({event.seconds * 1e3:.1f} ms)")
            case events.AdapterPlaced():
                self.moved(f"{event.adapter}: CPU -> slot {event.slot} ({event.seconds * 1e3:.1f} ms)")
            case events.AdapterEvicted():
                where = "the CPU cache" if event.slot is None else f"slot {event.slot}"
                self.moved(f"{event.adapter}: out of {where}")
            case _:
                pass

    def _admitted(self, row: Row, event: events.RequestAdmitted) -> None:
        row.state = "running"
        row.slot = event.slot
        if row.admitted is None:
            row.admitted = event.time
        where = "on the base model" if event.slot is None else f"in slot {event.slot}"
        self.say(f"{row.job.id} runs {where}, after waiting {event.queue_seconds:.2f} s")

    def _ended(self, row: Row, event: events.RequestEnded) -> None:
        row.state = "done" if event.reason in ("stop", "length") else "failed"
        row.tokens = event.output_tokens
        row.ended = event.time
        if event.error is not None:
            row.error = str(event.error)

    def moved(self, what: str) -> None:
        self.moves.append(what)
        self.say(what)
