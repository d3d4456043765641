"""The engine loop: asks the core what to do, runs it, and reports what happened.

One task, woken by events and asleep when there is nothing to do. The core is touched on the event loop's
thread only; model steps, reads and copies run elsewhere and are awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from weakref import WeakValueDictionary

from aioengine import events
from aioengine.core import Core, DropMove, StopMove
from aioengine.core.state import Request, Status
from aioengine.errors import ConfigError, EngineDead, EngineStopped
from aioengine.executors.base import Device
from aioengine.runtime.transfers import AdapterMoves
from aioengine.step import StepBatch, StepResult

logger = logging.getLogger("aioengine")

POLICY_RETRY_SECONDS = 0.05
"""Pause before a policy is asked again, if requests wait and nothing runs."""
SOONEST_SECONDS = 0.001
"""The least pause, whatever the policy wants."""
LAG_INTERVAL_SECONDS = 0.25

Listener = Callable[[events.Event], None]


class EngineLoop:
    """Drives a core with a device. ``virtual``: the loop's clock stands still while the loop is busy.
    ``intervals``: whether events about steps have the times between tokens."""

    def __init__(
        self,
        core: Core,
        device: Device,
        *,
        timer: Callable[[], float] = time.perf_counter,
        virtual: bool = False,
        intervals: bool = True,
    ) -> None:
        self.core = core
        self.listeners = Listeners()
        self.dead: EngineDead | None = None
        self.restarting: EngineDead | None = None
        """Why the device is being restarted; None: it is not."""
        self._device = device
        self._timer = timer
        self._intervals = intervals
        self._moves = AdapterMoves(core, device, changed=self.wake)
        self._changed = WeakValueDictionary[str | None, asyncio.Event]()
        """What callers wait for: the next change of an adapter or, under None, the next end of a request."""
        self._virtual = virtual
        self._lag: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._died = asyncio.Event()
        self._step_began: float | None = None
        self._decided = 0.0, 0.0
        """Seconds that core and policy took for the step that runs, and those of the policy alone."""
        self._stopping = False
        self._logged: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._lost: EngineDead | None = None
        """The loss of the device, until it is restarted."""
        self.listeners.add(self._log, events.PolicyRefused, events.PolicyFailed, events.PolicyReplaced)
        self.listeners.add(self._heard, events.AdapterEvent, events.RequestEnded)
        device.on_loss = self._device_lost

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run(), name="aioengine-loop")
        if not self._virtual:
            self._lag = loop.create_task(self._measure_lag(), name="aioengine-loop-lag")

    def wake(self) -> None:
        """Make the loop ask the core again; call after every change."""
        if self.dead is not None:
            self._free_retired()
            return
        self.publish()
        if self._device.repeats:
            self._device.interrupt()
        self._wake.set()

    def abort(self, request: Request) -> None:
        """End a request; its reader, if any, gets a last output with ``finish_reason="abort"``."""
        if request.status is not Status.ENDED:
            self._device.settle()
            self.core.end(request, "abort", self.now())
            self.wake()

    def now(self) -> float:
        """Return the time of the loop's clock."""
        return asyncio.get_running_loop().time()

    def check_goes_on(self) -> None:
        """Raise EngineStopped or EngineDead if the loop has ended or is ending."""
        if self.dead is not None:
            raise self.dead
        if self._stopping:
            raise EngineStopped("the engine was stopped before the call was complete")

    def step_age(self) -> float:
        """Return the seconds since the step that runs now began; 0 if none does."""
        began = self._step_began
        return 0.0 if began is None else self.now() - began

    async def until_dead(self) -> EngineDead:
        await self._died.wait()
        assert self.dead is not None
        return self.dead

    async def until(self, happened: Callable[[], bool], adapter: str | None = None) -> None:
        """Wait until ``happened()`` is true, which is asked at once, and after each event of this adapter
        or, without an adapter, after the end of each request. Raises what it raises, and EngineStopped or
        EngineDead if the engine ends first."""
        while not happened():
            self.check_goes_on()
            changed = self._changed.setdefault(adapter, asyncio.Event())
            await changed.wait()

    def _ask_again(self, *adapters: str | None) -> None:
        """Wake the callers that wait for something about these adapters."""
        for adapter in adapters:
            if (changed := self._changed.pop(adapter, None)) is not None:
                changed.set()

    def _heard(self, event: events.Event) -> None:
        """Wake the callers that this event may concern."""
        if isinstance(event, events.AdapterPinned):  # a pin may shut out any other adapter
            self._ask_again(*self._changed)
        elif isinstance(event, events.AdapterEvent):
            self._ask_again(event.adapter)
        elif isinstance(event, events.RequestEnded):
            if self._device.forget is not None:
                self._device.forget(event.request_id)
            self._ask_again(None)

    async def stop(self) -> None:
        """End all requests with EngineStopped, and wait for work that cannot be interrupted."""
        self._stopping = True
        self._end_all(EngineStopped("the engine was stopped before the request finished"))
        self.wake()
        moves = asyncio.get_running_loop().create_task(self._moves.stop(), name="aioengine-stop-moves")
        await asyncio.wait([moves] if self._task is None else [moves, self._task])
        if self._lag is not None:
            self._lag.cancel()
        self._free_retired()
        self._ask_again(*self._changed)
        await asyncio.sleep(0)  # callers that waited may now give up versions
        self._free_retired()

    # The loop

    async def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                try:
                    await self._run_steps()
                except EngineDead as error:
                    await self._recover(error)
        except asyncio.CancelledError:
            self._die(EngineStopped("the engine's loop was cancelled"))
            raise
        except Exception as error:
            logger.exception("the engine's loop failed; the engine is dead")
            self._die(error)

    async def _run_steps(self) -> None:
        """Run steps until none can follow; if none can be run now, sleep until something happens or is
        due. Raises EngineDead when the device is lost."""
        if self._lost is not None:
            raise self._lost
        batch = self._decide()
        if batch is None:
            now, due, ask = self.now(), self.core.next_due(), self.core.guard.quiet_until
            if ask <= now:  # the policy has named no time, or not all could be carried out
                ask = now + POLICY_RETRY_SECONDS if self.core.queues else math.inf
            due = min(max(ask, now + SOONEST_SECONDS), math.inf if due is None else due)
            await self._woken(None if due == math.inf else due)
            return
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._begin(batch, over)
        try:
            await over
        finally:
            self._step_began = None

    def _decide(self) -> StepBatch | None:
        """Ask the core for the next step, and begin the moves that it wants."""
        start = self._timer()
        batch, moves = self.core.schedule(self.now())
        self._decided = self._timer() - start, self.core.guard.seconds
        for move in moves:
            self._moves.start(move)
        self.publish()
        return batch

    def _begin(self, batch: StepBatch, over: asyncio.Future[None]) -> None:
        """Run ``batch`` and the steps after it, each begun where the result of the one before comes in, so
        that a step takes one turn of the event loop. ``over`` is done when none follows, or one has
        failed."""
        self._step_began = self.now()
        self._device.begin(batch, partial(self._ended, batch, over))

    def _ended(self, batch: StepBatch, over: asyncio.Future[None], result: StepResult | Exception) -> None:
        if over.done():  # the loop was cancelled
            return
        self._step_began = None
        try:
            if isinstance(result, Exception):
                raise result
            self._take(batch, result)
            # Also if nothing runs now: what the last request kept is given up before its reader goes on.
            if not self._stopping and self._lost is None:
                self._wake.clear()
                following = self._decide()
                if following is not None:
                    self._begin(following, over)
                    return
            over.set_result(None)
        except BaseException as error:  # else the loop would wait for ever
            over.set_exception(
                error if isinstance(error, Exception) else EngineDead(f"the step raised {error!r}")
            )

    def _take(self, batch: StepBatch, result: StepResult) -> None:
        """Report a result to the core."""
        now = self.now()
        wanted = bool(self.listeners.of(events.StepFinished))
        intervals = self.core.step_finished(batch, result, now, intervals=wanted and self._intervals)
        if wanted:
            event = events.StepFinished(
                time=result.ends[-1] if result.ends else now,
                step=batch.step,
                steps=len(result.seconds),
                seconds=sum(result.seconds),
                schedule_seconds=self._decided[0],
                policy_seconds=self._decided[1],
                intervals=tuple(chain.from_iterable(intervals)),
                **self.core.batcher.contents._asdict(),
            )
            self.core.outbox.append(event)
        self.publish()

    async def _woken(self, due: float | None) -> None:
        """Wait for ``wake``, at most until this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(due):
                await self._wake.wait()

    # Loss and end of the device

    def _device_lost(self, error: EngineDead) -> None:
        self._lost = error
        self._wake.set()

    async def _recover(self, error: EngineDead) -> None:
        """Fail the running requests and restart the device. Other requests wait meanwhile; they may be added,
        be aborted, or reach their deadlines. Raises EngineDead if the device cannot be started."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._lost = None
        self.core.device_lost(began, error)
        self._moves.device_lost()
        if self._device.restart is None:
            raise error
        self.restarting = error
        self.publish()
        restart = loop.create_task(self._device.restart(), name="aioengine-restart")
        restart.add_done_callback(lambda _: self._wake.set())
        try:
            while not restart.done() and not self._stopping:
                self._wake.clear()
                self.core.expire(loop.time())
                self.publish()
                await self._woken(self.core.next_due())
        finally:
            restart.cancel()  # does nothing if it is done
            await asyncio.wait([restart])
            self.restarting = None
        if restart.cancelled():
            return
        restart.result()
        seconds, waiting = loop.time() - began, len(self.core.requests)
        logger.warning("the workers run again after %.1f s; %d requests wait", seconds, waiting)
        self.report(events.EngineRestarted(time=loop.time(), seconds=seconds, error=error))

    def _die(self, cause: Exception) -> None:
        if isinstance(cause, EngineDead):
            self.dead = cause
        else:
            self.dead = EngineDead(f"the engine failed: {type(cause).__name__}: {cause}")
            self.dead.__cause__ = cause
        self._died.set()
        self._end_all(self.dead)
        self.core.step_lost()
        self._free_retired()
        self._ask_again(*self._changed)

    def _free_retired(self) -> None:
        """Free retired adapters, because callers wait for that and nothing will be scheduled any more."""
        self.core.residency.sweep(self.now())
        for move in self.core.residency.take_moves():
            if isinstance(move, (DropMove, StopMove)):
                self._moves.start(move)
        self.publish()

    def _end_all(self, error: Exception) -> None:
        now = self.now()
        for request in list(self.core.requests.values()):
            self.core.end(request, "error", now, error)

    # Events out

    def publish(self) -> None:
        """Deliver the events in the core's outbox."""
        while self.core.outbox:
            batch = self.core.outbox[:]
            self.core.outbox.clear()
            for event in batch:
                self.listeners(event)

    def report(self, event: events.Event) -> None:
        """Deliver ``event``, which comes from outside the core, after those in the core's outbox."""
        self.core.outbox.append(event)
        self.publish()

    async def _measure_lag(self) -> None:
        """Report, four times a second, how late in seconds the event loop ran a timer."""
        while True:
            # Not the loop's own clock: uvloop's stands still while a callback runs.
            due = self._timer() + LAG_INTERVAL_SECONDS
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            lag = max(self._timer() - due, 0.0)
            self.report(events.LoopLag(time=self.now(), seconds=lag))

    def _log(self, event: events.Event) -> None:
        match event:
            case events.PolicyRefused(reason=reason, item=first):
                what = f"the policy's decision was refused in part: {reason}"
            case events.PolicyFailed(error=first):
                what = "the policy failed; fcfs decides in its place"
            case events.PolicyReplaced():
                logger.warning("%s; fcfs decides from now on", event.reason)
                return
            case _:
                return
        if what not in self._logged:
            self._logged.add(what)
            logger.warning("%s (first: %s; logged once, counted each time)", what, first)


class Listeners:
    """Callbacks for events, each for all of them or for some types, called in the order of their coming. The
    same one may be added several times. Whatever one raises, a CancelledError too, is counted, and the first
    error of its kind is logged."""

    def __init__(self) -> None:
        self.failures = 0
        self._logged: set[tuple[str, type[BaseException]]] = set()
        self._all: dict[object, tuple[Listener, tuple[type[events.Event], ...]]] = {}
        """Each with the types that it was added for."""
        self._of: dict[type[events.Event], tuple[Listener, ...]] = {}

    def add(self, listener: Listener, *types: type[events.Event]) -> Callable[[], None]:
        """Call ``listener`` for every event, or for those of these types; returns a function that ends it.
        Raises ConfigError for what is no type of events."""
        for kind in types:
            if not (isinstance(kind, type) and issubclass(kind, events.Event)):
                raise ConfigError(f"{kind!r}: must be a class of aioengine.events")
        key = object()
        self._all[key] = listener, types or (events.Event,)
        self._of.clear()

        def remove() -> None:
            self._all.pop(key, None)
            self._of.clear()

        return remove

    def of(self, kind: type[events.Event]) -> tuple[Listener, ...]:
        """Return the listeners that want events of this type."""
        found = self._of.get(kind)
        if found is None:
            wanting = [listener for listener, types in self._all.values() if issubclass(kind, types)]
            found = self._of[kind] = tuple(wanting)
        return found

    def __call__(self, event: events.Event) -> None:
        for listener in self.of(type(event)):
            try:
                listener(event)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self.failures += 1
                name = getattr(listener, "__qualname__", type(listener).__qualname__)
                if (kind := (name, type(error))) not in self._logged:
                    self._logged.add(kind)
                    text = "the listener %s failed on %s (logged once, counted each time)"
                    logger.exception(text, name, type(event).__name__)
