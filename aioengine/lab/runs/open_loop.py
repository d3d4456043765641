"""Sends a workload to an engine or a fleet: each request at its time (an open loop), or when the one before
it has ended (a closed loop)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from aioengine.errors import AioEngineError, ConfigError, EngineDead, EngineStopped
from aioengine.lab.workload.requests import Arrival, Workload

if TYPE_CHECKING:
    from aioengine.engine import AsyncEngine
    from aioengine.lab.fleet.fleet import SimulatedFleet
    from aioengine.lab.runs.recorder import Recorder
    from aioengine.lab.workload.prompts import LiveRequests, SimulatedRequests

STALL_SECONDS = 600.0
"""A run is given up after this time without a step or a move while requests wait."""

MOST_WITHOUT_TOKEN = 10_000
"""A run is given up after this many steps and moves in which no request got a token."""

Progress = Callable[[int, int | None, float], None]
"""Callback with the number of requests that have ended, their total (None: not known), and the seconds into
the run."""


class RunStalled(AioEngineError):
    """Error for a run in which nothing moves, because of the policy or of the requests."""


class Replayed(NamedTuple):
    """Result of a workload."""

    requests: int
    finished: int
    """Up to their last token."""
    refused: int
    """Never accepted."""
    failed: int
    """Accepted, and ended with an error, for example because a deadline passed."""
    seconds: float
    """From the start to the end of the last request."""


@dataclass(kw_only=True)
class OpenLoop:
    """Sends a workload and waits for all of it. No more of it is held than the requests that have not ended.

    Raises ConfigError if ``sample_seconds`` is not more than 0.
    """

    target: AsyncEngine | SimulatedFleet
    recorder: Recorder
    workload: Workload
    requests: SimulatedRequests | LiveRequests
    start: float
    sample_seconds: float = 1.0
    progress: Progress | None = None
    total: int | None = None
    lengths: dict[str, int] | None = None
    """Where the target finds the lengths of outputs, by request; None: it needs none."""
    state: Callable[[], str] = lambda: "requests are in flight"
    """Describes the target's state, for the message that nothing moves."""
    _ends: dict[int, asyncio.Event] = field(default_factory=dict)
    """The ends that others wait for, by the request's number."""

    def __post_init__(self) -> None:
        if not self.sample_seconds > 0:
            raise ConfigError(f"sample_seconds={self.sample_seconds}: must be more than 0")
        self._loop = asyncio.get_running_loop()
        self._finished = self._refused = self._failed = 0
        callers = self.workload.concurrency
        self._callers = None if callers is None else asyncio.Semaphore(callers)

    async def send_all(self) -> Replayed:
        """Send all requests and wait for them. Raises RunStalled if nothing has moved for
        :data:`STALL_SECONDS` while requests wait, or if no request got a token in :data:`MOST_WITHOUT_TOKEN`
        steps and moves."""
        try:
            async with asyncio.TaskGroup() as around:
                watch = around.create_task(self._watch(), name="aioengine-lab-watch")
                async with asyncio.TaskGroup() as requests:
                    await self._send_each(requests)
                watch.cancel()
        except* AioEngineError as errors:
            first: BaseException = errors  # several at a time are usually alike
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
        count = self._finished + self._refused + self._failed
        seconds = self._loop.time() - self.start
        return Replayed(count, self._finished, self._refused, self._failed, seconds)

    def close(self) -> None:
        """Record the rest, when nothing more comes."""
        now = self._loop.time()
        self.recorder.close(now)
        self._tell(now)

    def _tell(self, now: float) -> None:
        """Report how far it is."""
        if self.progress is not None:
            self.progress(self.recorder.ended, self.total, now - self.start)

    async def _send_each(self, group: asyncio.TaskGroup) -> None:
        for index, arrival in enumerate(self.workload):
            if self._callers is None:
                wait = self.start + arrival.time - self._loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                if arrival.is_alone:
                    group.create_task(self._send(index, arrival))
                    continue
            elif arrival.first:
                await self._callers.acquire()
            before = self._ends.get(index - arrival.after) if arrival.after else None
            if arrival.more:
                self._ends[index] = asyncio.Event()
            group.create_task(self._send_in_turn(index, arrival, before))

    async def _send_in_turn(self, index: int, arrival: Arrival, before: asyncio.Event | None) -> None:
        """Send a request of a session, or of a caller in a closed loop, when it is its turn."""
        if before is not None:
            await before.wait()
            await asyncio.sleep(arrival.think)
        try:
            await self._send(index, arrival._replace(time=self._loop.time() - self.start))
        finally:
            if arrival.more:
                self._ends.pop(index).set()
        if arrival.last and self._callers is not None:
            await asyncio.sleep(self.workload.think)
            self._callers.release()

    async def _send(self, index: int, arrival: Arrival) -> None:
        """Send one request, and count how it ends."""
        request_id = f"r{index}"
        self.recorder.expect(request_id, arrival)
        if self.lengths is not None:
            self.lengths[request_id] = arrival.output_tokens
        failed = output = None
        try:
            output = await self.target.complete(
                self.requests.prompt(index, arrival),
                self.requests.params(arrival),
                adapter=arrival.adapter,
                request_id=request_id,
                priority=arrival.priority,
                deadline=arrival.deadline,
                tenant=arrival.tenant,
                expected_tokens=arrival.expected_tokens,
            )
        except AioEngineError as error:
            if self.lengths is None and isinstance(error, (EngineDead, EngineStopped)):
                raise  # there is nothing more to be had of a live engine
            failed = error
        finally:
            if self.lengths is not None:
                del self.lengths[request_id]
        accepted = self.recorder.settled(request_id, self._loop.time(), failed, output)
        self._finished += failed is None
        self._failed += failed is not None and accepted
        self._refused += not accepted

    async def _watch(self) -> None:
        """Sample at regular times, and check that something moves."""
        recorder, tick = self.recorder, 0
        while True:
            tick += 1
            await asyncio.sleep(self.start + tick * self.sample_seconds - self._loop.time())
            now = self._loop.time()
            recorder.sample(now)
            self._tell(now)
            if not recorder.under_way:
                recorder.last_progress = now
                continue
            if now - recorder.last_progress > STALL_SECONDS:
                what = f"no step and no move of an adapter ended for {STALL_SECONDS:g} s"
            elif recorder.since_token > MOST_WITHOUT_TOKEN:
                what = (
                    f"no request had a token in the last {recorder.since_token:,} steps and moves of adapters"
                )
            else:
                continue
            raise RunStalled(
                f"at {now - self.start:g} s: {what}, while {self.state()}; see what the policy waits for"
            )
