"""Sends a workload to an engine or a fleet: each request at its time (an open loop), or when the one before
it has ended (a closed loop)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from aioengine.errors import AioEngineError, ConfigError, EngineDead, EngineStopped
from aioengine.lab.workload.requests import Arrival, Workload
from aioengine.runtime.output import RequestOutput

if TYPE_CHECKING:
    from aioengine.engine import AsyncEngine
    from aioengine.lab.calibration.live import LiveRequests
    from aioengine.lab.fleet.fleet import SimulatedFleet
    from aioengine.lab.runs.recorder import Recorder
    from aioengine.lab.workload.prompts import SimulatedRequests

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


class OpenLoop:
    """Sends a workload and waits for all of it. No more of it is held than the requests that have not ended.

    Args:
        lengths: Where the target finds the lengths of outputs, by request; None: it needs none.
        state: Describes the target's state, for the message that nothing moves.

    Raises ConfigError if ``sample_seconds`` is not more than 0.
    """

    def __init__(
        self,
        target: AsyncEngine | SimulatedFleet,
        recorder: Recorder,
        workload: Workload,
        requests: SimulatedRequests | LiveRequests,
        *,
        start: float,
        sample_seconds: float = 1.0,
        progress: Progress | None = None,
        total: int | None = None,
        lengths: dict[str, int] | None = None,
        state: Callable[[], str] = lambda: "requests are in flight",
    ) -> None:
        if not sample_seconds > 0:
            raise ConfigError(f"sample_seconds={sample_seconds}: must be more than 0")
        self._target = target
        self._recorder = recorder
        self._workload = workload
        self._requests = requests
        self._start = start
        self._sample_seconds = sample_seconds
        self._progress = progress
        self._total = total
        self._lengths = lengths
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._finished = self._refused = self._failed = 0
        self._ends: dict[int, asyncio.Event] = {}
        """The ends that others wait for, by the request's number."""
        self._callers: asyncio.Semaphore | None = None
        if workload.concurrency is not None:
            self._callers = asyncio.Semaphore(workload.concurrency)

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
            raise _first(errors) from None
        count = self._finished + self._refused + self._failed
        seconds = self._loop.time() - self._start
        return Replayed(count, self._finished, self._refused, self._failed, seconds)

    def close(self) -> None:
        """Record the rest, when nothing more comes."""
        now = self._loop.time()
        self._recorder.close(now)
        self._tell(now)

    def _tell(self, now: float) -> None:
        """Report how far it is."""
        if self._progress is not None:
            self._progress(self._recorder.ended, self._total, now - self._start)

    async def _send_each(self, group: asyncio.TaskGroup) -> None:
        loop, start = self._loop, self._start
        for index, arrival in enumerate(self._workload):
            if self._callers is None:
                wait = start + arrival.time - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                if arrival.is_alone:
                    group.create_task(self._send(f"r{index}", index, arrival))
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
            await self._send(f"r{index}", index, arrival._replace(time=self._loop.time() - self._start))
        finally:
            if arrival.more:
                self._ends.pop(index).set()
        if arrival.last and self._callers is not None:
            await asyncio.sleep(self._workload.think)
            self._callers.release()

    async def _send(self, request_id: str, index: int, arrival: Arrival) -> None:
        """Send one request, and count how it ends."""
        self._recorder.expect(request_id, arrival)
        if self._lengths is not None:
            self._lengths[request_id] = arrival.output_tokens
        failed: AioEngineError | None = None
        output: RequestOutput | None = None
        try:
            output = await self._target.complete(
                self._requests.prompt(index, arrival),
                self._requests.params(arrival),
                adapter=arrival.adapter,
                request_id=request_id,
                priority=arrival.priority,
                deadline=arrival.deadline,
                tenant=arrival.tenant,
                expected_tokens=arrival.expected_tokens,
            )
        except AioEngineError as error:
            if self._lengths is None and isinstance(error, (EngineDead, EngineStopped)):
                raise  # there is nothing more to be had of a live engine
            failed = error
        finally:
            if self._lengths is not None:
                del self._lengths[request_id]
        accepted = self._recorder.settled(request_id, self._loop.time(), failed, output)
        self._finished += failed is None
        self._failed += failed is not None and accepted
        self._refused += not accepted

    async def _watch(self) -> None:
        """Sample at regular times, and check that something moves."""
        loop, recorder, tick = self._loop, self._recorder, 0
        while True:
            tick += 1
            await asyncio.sleep(self._start + tick * self._sample_seconds - loop.time())
            now = loop.time()
            recorder.sample(now)
            self._tell(now)
            if not recorder.under_way:
                recorder.last_progress = now
            elif now - recorder.last_progress > STALL_SECONDS:
                raise self._stalled(now, f"no step and no move of an adapter ended for {STALL_SECONDS:g} s")
            elif recorder.since_token > MOST_WITHOUT_TOKEN:
                count = f"{recorder.since_token:,} steps and moves of adapters"
                raise self._stalled(now, f"no request had a token in the last {count}")

    def _stalled(self, now: float, what: str) -> RunStalled:
        at = now - self._start
        return RunStalled(f"at {at:g} s: {what}, while {self._state()}; see what the policy waits for")


def _first(errors: BaseExceptionGroup[AioEngineError]) -> AioEngineError:
    """Return the first of several simultaneous errors, which are usually alike."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
