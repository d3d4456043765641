"""The step loop: asks the core what to do, has it done, and tells everybody what happened.

One task, woken by events and asleep when there is nothing to do. The core is touched on the event
loop's thread only; model steps, reads and copies run elsewhere and are awaited.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from aioengine import events
from aioengine.core import CopyMove, Core, DropMove, LoadMove, Move
from aioengine.core.state import AdapterEntry, Request
from aioengine.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterLoadError,
    AdapterTooLarge,
    AioEngineError,
    EngineDead,
    EngineStopped,
)
from aioengine.executors.base import Executor
from aioengine.step import Sampled, StepBatch
from aioengine.stream import OutputStream
from aioengine.timing import DecisionTimer, LoopLagMeter, TokenIntervals

if TYPE_CHECKING:
    from aioengine.adapters.loader import LoadedAdapter

logger = logging.getLogger("aioengine")

POLICY_RETRY_SECONDS = 0.05
"""How soon a policy is asked again that admitted nothing although nothing runs and nothing loads."""

Listener = Callable[[events.Event], None]


class Loader(Protocol):
    async def load(self, uid: int, name: str, path: str) -> LoadedAdapter: ...
    async def place(self, uid: int, slot: int) -> float: ...
    def drop(self, uid: int) -> None: ...


class Stepper:
    """Drives a core with an executor and an adapter loader.

    ``listeners`` are called for every event, in order. ``loaded`` holds, by adapter uid, what to call
    when its read has ended (with the error, or None). ``timer`` is the core's, if it has one.
    """

    def __init__(
        self, core: Core, executor: Executor, loader: Loader, timer: DecisionTimer | None = None
    ) -> None:
        self.core = core
        self.streams: dict[str, OutputStream] = {}
        self.listeners: list[Listener] = []
        self.loaded: dict[int, Callable[[AioEngineError | None], None]] = {}
        self.dead: EngineDead | None = None
        self._executor = executor
        self._loader = loader
        self._timer = timer
        self._intervals = TokenIntervals()
        self._lag = LoopLagMeter(self._report_lag)
        self._wake = asyncio.Event()
        self._stopping = False
        self._moves: set[asyncio.Task[None]] = set()
        self._logged: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="aioengine-stepper")
        self._lag.start()

    def wake(self) -> None:
        """Have the core asked again; call after every change to it."""
        self.publish()
        self._wake.set()

    async def stop(self) -> None:
        """End what has not ended with EngineStopped, and wait for what cannot be interrupted."""
        self._stopping = True
        self._end_all(EngineStopped("the engine was stopped before the request finished"))
        self.wake()
        if self._task is not None:
            await asyncio.wait([self._task])
        while self._moves:
            await asyncio.wait(self._moves)
        self._lag.stop()
        self.publish()

    # The loop

    async def _run(self) -> None:
        try:
            while not self._stopping:
                await self._step()
        except asyncio.CancelledError:
            self._die(EngineStopped("the engine's step loop was cancelled"))
            raise
        except Exception as error:
            logger.exception("the step loop failed; the engine is dead")
            self._die(error)

    async def _step(self) -> None:
        loop = asyncio.get_running_loop()
        self._wake.clear()
        start = time.perf_counter()
        batch, moves = self.core.schedule(loop.time())
        schedule_seconds = time.perf_counter() - start
        policy_seconds = 0.0 if self._timer is None else self._timer.seconds
        for move in moves:
            self._start(move)
        self.publish()
        if batch is None:
            await self._sleep(loop)
            return
        result = await self._executor.execute(batch)
        now = loop.time()

        def deliver(request: Request, sampled: Sampled, is_stop: bool) -> bool:
            self._intervals.token(request)
            return self.streams[request.id].push(sampled, now, is_stop=is_stop)

        self.core.step_finished(batch, result, now, deliver)
        self.core.outbox.append(
            events.StepFinished(
                time=now,
                step=batch.step,
                seconds=result.seconds,
                schedule_seconds=schedule_seconds,
                policy_seconds=policy_seconds,
                intervals=self._intervals.take(now),
                **_contents(batch),
            )
        )
        self.publish()

    async def _sleep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Until something happens, or a deadline is due."""
        due = self.core.next_deadline()
        timeout = None if due is None else max(due - loop.time(), 0.0)
        if self.core.queues and not self._moves:
            timeout = POLICY_RETRY_SECONDS if timeout is None else min(timeout, POLICY_RETRY_SECONDS)
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _die(self, cause: Exception) -> None:
        self.dead = EngineDead(f"the engine failed: {type(cause).__name__}: {cause}")
        self.dead.__cause__ = cause
        self._end_all(self.dead)
        for callback in list(self.loaded.values()):
            callback(self.dead)
        self.publish()

    def _end_all(self, error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        for request in list(self.core.requests.values()):
            self.core.end(request, "error", now, error)

    # Adapter moves

    def _start(self, move: Move) -> None:
        match move:
            case DropMove(entry):
                self._loader.drop(entry.uid)
            case LoadMove(entry):
                self._spawn(self._load(entry), f"aioengine-load-{entry.label}")
            case CopyMove(entry, slot):
                self._spawn(self._copy(entry, slot), f"aioengine-copy-{entry.label}")

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def _load(self, entry: AdapterEntry) -> None:
        loop = asyncio.get_running_loop()
        failure: AioEngineError | None = None
        try:
            done = await self._loader.load(entry.uid, entry.label, entry.path)
        except AdapterError as error:
            failure = error
            self.core.adapter_load_failed(entry, loop.time(), error, _load_failure(error))
        except Exception as error:
            logger.exception("loading adapter %r failed unexpectedly", entry.label)
            failure = AdapterLoadError(
                f"unexpected {type(error).__name__}: {error}", name=entry.label, path=entry.path
            )
            failure.__cause__ = error
            self.core.adapter_load_failed(entry, loop.time(), failure, "internal")
        else:
            self.core.adapter_loaded(
                entry,
                loop.time(),
                rank=done.rank,
                nbytes=done.nbytes,
                digest=done.digest,
                seconds=done.seconds,
            )
        callback = self.loaded.pop(entry.uid, None)
        if callback is not None:
            callback(failure)
        self.wake()

    async def _copy(self, entry: AdapterEntry, slot: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            seconds = await self._loader.place(entry.uid, slot)
        except Exception as error:
            logger.exception("copying adapter %r into slot %d failed", entry.label, slot)
            failure = AdapterLoadError(
                f"could not be copied into slot {slot}: {error}", name=entry.label, path=entry.path
            )
            self.core.adapter_place_failed(entry, loop.time(), failure)
        else:
            self.core.adapter_placed(entry, loop.time(), seconds)
        self.wake()

    # Events out

    def publish(self) -> None:
        """Deliver the events that the core has left."""
        while self.core.outbox:
            batch, self.core.outbox = self.core.outbox, []
            for event in batch:
                self._deliver(event)

    def _deliver(self, event: events.Event) -> None:
        if isinstance(event, events.RequestEnded):
            stream = self.streams.pop(event.request_id, None)
            if stream is not None:
                stream.end(event.reason, event.error)
        elif isinstance(event, events.PolicyRefused):
            self._log_once(f"the policy's decision was refused in part: {event.reason}", event.item)
        elif isinstance(event, events.PolicyFailed):
            self._log_once("the policy failed; fcfs decides in its place", event.error)
        elif isinstance(event, events.PolicyReplaced):
            logger.warning("%s; fcfs decides from now on", event.reason)
        for listener in list(self.listeners):
            try:
                listener(event)
            except Exception:
                logger.exception("an event listener failed on %s", type(event).__name__)

    def _report_lag(self, seconds: float) -> None:
        self.core.outbox.append(events.LoopLag(time=asyncio.get_running_loop().time(), seconds=seconds))
        self.publish()

    def _log_once(self, what: str, item: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            logger.warning("%s (first: %s; said once, counted always)", what, item)


def _contents(batch: StepBatch) -> dict[str, Any]:
    """The fields of StepFinished that say what was in the step."""
    slots: set[int] = set()
    tokens = decode = 0
    for work in batch.sequences:
        slots.add(work.slot)
        count = len(work.tokens)
        tokens += count
        if count == 1 and work.start >= work.prompt_len:
            decode += 1
    used = tuple(sorted(slots - {-1}))
    return {
        "sequences": len(batch.sequences),
        "adapters": len(used),
        "prefill_tokens": tokens - decode,
        "decode_tokens": decode,
        "slots": used,
    }


def _load_failure(error: AdapterError) -> events.LoadFailure:
    if isinstance(error, AdapterTooLarge):
        return "too_large"
    return "invalid" if isinstance(error, AdapterInvalid) else "io"
