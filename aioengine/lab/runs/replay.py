"""Sends a workload to an engine, live or simulated, or to a simulated fleet, and records what happens: each
request at its time (an open loop), or when the one before it has ended (a closed loop)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError, EngineDead, EngineStopped
from aioengine.lab.fleet.fleet import START_SECONDS, SimulatedFleet, Watch
from aioengine.lab.runs.recorder import PolicyWatch, Recorder
from aioengine.lab.runs.rows import Sink
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.prompts import LiveRequests, SimulatedRequests
from aioengine.lab.workload.requests import Arrival, Workload

STALL_SECONDS = 600.0
"""A run is given up after this time without a step or a move while requests wait."""

MOST_WITHOUT_TOKEN = 10_000
"""A run is given up after this many steps and moves in which no request got a token."""

Progress = Callable[[int, int | None, float], None]
"""Callback with the number of requests that have ended, their total (None: not known), and the seconds into
the run."""


class RunStalled(AioEngineError):
    """Error for a run in which nothing moves, because of the policy or of the requests."""


class Watching(TypedDict, total=False):
    """How a run is watched."""

    sample_seconds: float
    """Between two samples; ``progress`` is told as often."""
    progress: Progress | None
    total: int | None
    """How many requests there are, for ``progress``."""


async def replay(
    engine: AsyncEngine,
    workload: Workload,
    sink: Sink,
    *,
    paths: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    listener: PolicyWatch | None = None,
    **watching: Unpack[Watching],
) -> None:
    """Send every request at its time, whether or not earlier ones have ended (an open loop), and wait for all
    of them. Only requests that have not ended are in memory.

    Args:
        engine: It must be running; the workload's adapters are registered first.
        paths: Where a live engine finds the adapters, by name.
        seed: For the prompts, which are random tokens on a live engine.
        listener: Called with the engine's events.

    Raises RunStalled if nothing has moved for ``STALL_SECONDS`` while requests wait, or no request got a
    token in ``MOST_WITHOUT_TOKEN`` steps and moves.
    """
    requests: SimulatedRequests | LiveRequests
    if isinstance(engine, SimulatedEngine):
        engine.add_adapters(workload.adapters)
        requests, lengths = SimulatedRequests(engine.model_spec.vocab_size), engine.lengths
    else:
        requests, lengths = LiveRequests(engine.model_spec, seed), None
        for name, path in (paths or {}).items():
            engine.register_adapter(name, path)

    def state() -> str:
        stats = engine.stats()
        slots = ", ".join(f"{slot.adapter or 'empty'} ({slot.state})" for slot in stats.slots[:8])
        return (
            f"{stats.waiting} requests wait ({stats.waiting_for_adapter} of them for an adapter) and "
            f"{stats.running} run; slots: {slots}{', ...' if len(stats.slots) > 8 else ''}"
        )

    start = asyncio.get_running_loop().time()
    recorder = Recorder(sink, workload, start=start, listener=listener)
    sender = _Sender(engine, recorder, workload, requests, start, lengths, state, **watching)
    unwatch = recorder.watch(engine)
    try:
        await sender.send_all()
        sender.close()
    finally:
        unwatch(asyncio.get_running_loop().time())


async def replay_on_fleet(
    workload: Workload,
    sink: Sink,
    *,
    open_fleet: Callable[[Watch], SimulatedFleet],
    listener: PolicyWatch | None = None,
    **watching: Unpack[Watching],
) -> SimulatedFleet:
    """Start a fleet, send every request at its time, wait for all of them, and stop the fleet. Returns it,
    because it knows what happened.

    Args:
        open_fleet: Makes the fleet, which calls what it is given as ``watch``.
        listener: Called with the events of all replicas' engines.

    Raises what :func:`replay` raises.
    """
    start = asyncio.get_running_loop().time() + START_SECONDS
    fleet = open_fleet(lambda engine, index: recorder.watch(engine, index))
    lora = fleet.config.engine.lora
    slots = 0 if lora is None else lora.max_loras
    recorder = Recorder(sink, workload, start=start, slots=slots, delay=fleet.delay, listener=listener)
    async with fleet:
        fleet.add_adapters(workload.adapters)
        requests = SimulatedRequests(fleet.costs.spec.vocab_size)
        sender = _Sender(fleet, recorder, workload, requests, start, fleet.lengths, **watching)
        await sender.send_all()
        fleet.check_invariants()
    sender.close()
    return fleet


@dataclass
class _Sender:
    """Sends a workload and waits for all of it. No more of it is held than the requests that have not
    ended."""

    target: AsyncEngine | SimulatedFleet
    recorder: Recorder
    workload: Workload
    requests: SimulatedRequests | LiveRequests
    start: float
    lengths: dict[str, int] | None
    """Where the target finds the lengths of outputs, by request; None: it needs none."""
    state: Callable[[], str] = lambda: "requests are in flight"
    """Describes the target's state, for the message that nothing moves."""
    sample_seconds: float = 1.0
    progress: Progress | None = None
    total: int | None = None
    _ends: dict[int, asyncio.Event] = field(default_factory=dict)
    """The ends that others wait for, by the request's number."""

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        callers = self.workload.concurrency
        self._callers = None if callers is None else asyncio.Semaphore(callers)

    async def send_all(self) -> None:
        """Send all requests and wait for them. Raises RunStalled."""
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

    def close(self) -> None:
        """Record the rest, when nothing more comes."""
        now = self._loop.time()
        self.recorder.close(now)
        self._tell(now)

    def _tell(self, now: float) -> None:
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
        """Send one request, and record how it ends."""
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
        self.recorder.settled(request_id, self._loop.time(), failed, output)

    async def _watch(self) -> None:
        """Sample at regular times, and check that something moves."""
        recorder, tick = self.recorder, 0
        while True:
            tick += 1
            await asyncio.sleep(self.start + tick * self.sample_seconds - self._loop.time())
            now = self._loop.time()
            recorder.sample(now)
            self._tell(now)
            if not recorder.requests:
                recorder.last_progress = now
            elif now - recorder.last_progress > STALL_SECONDS:
                self._stalled(now, f"no step and no move of an adapter ended for {STALL_SECONDS:g} s")
            elif (since := recorder.since_token) > MOST_WITHOUT_TOKEN:
                self._stalled(
                    now, f"no request had a token in the last {since:,} steps and moves of adapters"
                )

    def _stalled(self, now: float, what: str) -> None:
        raise RunStalled(
            f"at {now - self.start:g} s: {what}, while {self.state()}; see what the policy waits for"
        )
