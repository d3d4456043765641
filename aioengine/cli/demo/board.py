"""Board: the demo's requests and swaps, as a client sees them, on one engine and on a fleet."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from aioengine.cli.demo.jobs import Job
from aioengine.errors import AioEngineError
from aioengine.info import EngineStats, SlotInfo
from aioengine.request import SamplingParams

if TYPE_CHECKING:
    from aioengine.runtime.client import EngineClient

ARRIVAL_SECONDS = 0.15
"""Seconds between the arrivals of two requests."""

ReplicaOf = Callable[[str], str | None]
"""Names the replica that runs a request; None: there is one engine."""

State = Literal["soon", "waiting", "running", "done", "failed"]


@dataclass
class Row:
    """One request and its progress."""

    job: Job
    state: State = "soon"
    place: str = ""
    """Where it runs."""
    replica: str | None = None
    text: str = ""
    tokens: int = 0
    ttft: float | None = None
    """Seconds from its arrival to its first token."""
    seconds: float = 0.0
    """From its first token to its end."""
    passed: bool | None = None
    error: str | None = None


class Board:
    """One row for each request, and the latest adapter moves.

    ``say`` is called with a line of text for whatever is new.
    """

    def __init__(self, jobs: list[Job], say: Callable[[str], None]) -> None:
        self.rows = {job.id: Row(job) for job in jobs}
        self.moves: deque[str] = deque(maxlen=3)
        self.begun = time.perf_counter()
        """When the first request arrived."""
        self._say = say
        self._held: dict[str, str] = {}
        """Adapter by the place of its slot, at the last look."""

    @property
    def seconds(self) -> float:
        """Time since the first request arrived."""
        return time.perf_counter() - self.begun

    @property
    def all_finished(self) -> bool:
        return all(row.state == "done" for row in self.rows.values())

    async def ask_all(self, client: EngineClient, params: SamplingParams, replica_of: ReplicaOf) -> None:
        """Send all requests, one after the other, and wait for all."""

        async def arrive(row: Row, delay: float) -> None:
            await asyncio.sleep(delay)
            await self._ask(row, client, params, replica_of)

        self.begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, row in enumerate(self.rows.values()):
                group.create_task(arrive(row, index * ARRIVAL_SECONDS))

    async def _ask(
        self,
        row: Row,
        client: EngineClient,
        params: SamplingParams,
        replica_of: ReplicaOf,
    ) -> None:
        """Run one client: send its prompt and read its answer."""
        job = row.job
        row.state, sent, first = "waiting", time.perf_counter(), 0.0
        try:
            outputs = client.generate(job.messages, params, adapter=job.adapter, request_id=job.id)
            async for out in outputs:
                if row.ttft is None and out.output_tokens:
                    first = time.perf_counter()
                    row.state, row.ttft, row.replica = "running", first - sent, replica_of(job.id)
                    self._say(f"{job.id}: first token after {row.ttft:.2f} s")
                row.text, row.tokens = out.text, out.output_tokens
        except AioEngineError as error:
            row.state, row.error = "failed", str(error)
            self._say(f"{job.id} failed: {error}")
        else:
            row.state = "done"
            row.passed = None if job.check is None else job.check(row.text)
            verdict = {True: " [right]", False: " [wrong]", None: ""}[row.passed]
            self._say(f"{job.id} done{verdict}: {' '.join(row.text.split())}")
        row.seconds = time.perf_counter() - first if first else 0.0

    def look(self, stats: EngineStats) -> None:
        """Note where the adapters are now; say which have moved since the last look."""
        before = self._held
        self._held = {place_of(slot): slot.adapter for slot in stats.slots if slot.adapter is not None}
        for place, adapter in self._held.items():
            if before.get(place) != adapter:
                self.moves.append(f"{adapter}: into {place}")
                self._say(self.moves[-1])
        for row in self.rows.values():
            row.place = "" if row.replica is None else row.replica
            for slot in stats.slots:
                if row.job.adapter == slot.adapter is not None and row.replica == slot.replica:
                    row.place = place_of(slot)


def place_of(slot: SlotInfo) -> str:
    """Name a slot."""
    return f"slot {slot.index}" if slot.replica is None else f"{slot.replica} slot {slot.index}"
