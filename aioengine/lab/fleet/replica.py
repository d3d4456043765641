"""One replica of a simulated fleet: an engine, and the link to the door that its messages take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from aioengine import events
from aioengine.core.replica_report import ReplicaReporter
from aioengine.errors import AioEngineError, EngineDead, EngineStopped
from aioengine.lab.fleet.conditions import Conditions
from aioengine.lab.simulation.engine import TOKEN, SimulatedEngine
from aioengine.request import SamplingParams
from aioengine.runtime.output import RequestOutput
from aioengine.schedulers.routing import Move, ReplicaLimits, Report
from aioengine.tasks import end_tasks

IDLE_REPORTS = 20
"""An idle replica sends only every n-th report, often enough not to be given up."""


class ReplicaLost(Exception):
    """Error for a replica that died or cannot be reached."""

    def __init__(self, delivered: int) -> None:
        super().__init__("the replica is lost")
        self.delivered = delivered
        """Output tokens that had reached the door."""


class Attempt:
    """A request on one replica. ``outcome`` is the result that reaches the door."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.outcome: asyncio.Future[RequestOutput] = loop.create_future()
        self.delivered = 0
        """Tokens that had reached the door when the link was cut or the replica died."""
        self.task: asyncio.Task[None] | None = None


class SimulatedReplica:
    """A replica. The door calls ``started`` and ``reported`` after the link's delay."""

    def __init__(
        self,
        replica_id: str,
        index: int,
        engine: SimulatedEngine,
        conditions: Conditions,
        *,
        started: Callable[[str], None],
        reported: Callable[[str, Report], None],
    ) -> None:
        self.replica_id = replica_id
        self.index = index
        self.engine = engine
        self.alive = True
        self.attempts: dict[str, Attempt] = {}
        self._conditions = conditions
        self._started = started
        self._reported = reported
        self._loop = asyncio.get_running_loop()
        self._skew = conditions.skew.get(index, 0.0)
        self._reporter = ReplicaReporter(engine._core)
        self._open = asyncio.Event()
        self._open.set()
        self._received = self._ended = 0
        self._channel = 0
        """Number of the channel; messages of an earlier channel do not count."""
        self._told_version = -1
        self._last: tuple[Any, ...] = ()
        self._quiet = 0
        often = conditions.silent_after / 4 / conditions.report_seconds
        self._most_quiet = max(min(IDLE_REPORTS, int(often)), 1)
        engine.add_listener(self._reporter, *self._reporter.HEARD)
        engine.add_listener(self._on_event, events.FirstToken)
        self._tasks: set[asyncio.Task[None]] = set()
        self._reporting = self._spawn(self._report_always(), "report")

    @property
    def limits(self) -> ReplicaLimits:
        return self._reporter.limits

    # The door's side

    def submit(self, prompt: list[int], params: SamplingParams, output: int, **options: Any) -> Attempt:
        """Send a request over the link. ``output`` tokens of it have been delivered before."""
        attempt = Attempt(self._loop)
        attempt.delivered = output
        self.attempts[options["request_id"]] = attempt
        attempt.task = self._spawn(
            self._run(attempt, self._channel, prompt, params, [TOKEN] * output, options), "attempt"
        )
        return attempt

    def close_channel(self) -> None:
        """Note that the door has given the replica up: its requests are aborted there, and fail here."""
        self._channel += 1
        self._received = self._ended = 0
        self._told_version = -1
        for request_id, attempt in self.attempts.items():
            made = self._made(request_id) if self.alive and self._open.is_set() else 0
            if not attempt.outcome.done():
                attempt.outcome.set_exception(ReplicaLost(attempt.delivered + made))
            if attempt.task is not None:
                attempt.task.cancel()
        self.attempts.clear()

    def move(self, move: Move) -> None:
        """Carry out a step of a plan."""
        self._spawn(self._move(move), "move")

    # What happens to it

    def cut(self) -> None:
        """Cut the link, so that no message passes."""
        self._keep_delivered()
        self._open.clear()

    def heal(self) -> None:
        self._told_version = -1  # what was said meanwhile is lost
        self._open.set()

    @property
    def reachable(self) -> bool:
        return self.alive and self._open.is_set()

    async def kill(self) -> None:
        """End its process."""
        self._keep_delivered()
        self.alive = False
        await self.close()

    async def close(self) -> None:
        self._reporting.cancel()
        await self.engine.stop()
        await end_tasks(self._tasks)

    # Inside

    async def _run(
        self,
        attempt: Attempt,
        channel: int,
        prompt: list[int],
        params: SamplingParams,
        output: Sequence[int],
        options: dict[str, Any],
    ) -> None:
        await self._cross()
        self._received += channel == self._channel
        found: RequestOutput | AioEngineError
        try:
            found = await self.engine.complete(prompt, params, output=output, **options)
        except (EngineStopped, EngineDead):
            return  # nobody is there to say so: the door finds out
        except AioEngineError as error:
            found = error
        finally:
            self._ended += channel == self._channel
        await self._cross()
        self.attempts.pop(options["request_id"], None)
        if attempt.outcome.done():
            return
        if isinstance(found, AioEngineError):
            attempt.outcome.set_exception(found)
        else:
            attempt.outcome.set_result(found)

    async def _cross(self) -> None:
        """Deliver a message over the link."""
        if self._conditions.delay:
            await asyncio.sleep(self._conditions.delay)
        await self._open.wait()

    async def _move(self, move: Move) -> None:
        await self._cross()
        with suppress(AioEngineError):  # a plan is a wish
            match move.kind:
                case "load":
                    await self.engine.load_adapter(move.adapter)
                case "pin":
                    await self.engine.pin_adapter(move.adapter)
                case "unpin":
                    await self.engine.unpin_adapter(move.adapter)
                # "unload": nothing to do, because the cache first drops adapters that are not used

    def _on_event(self, event: events.Event) -> None:
        if isinstance(event, events.FirstToken) and event.request_id in self.attempts:
            self._later(self._conditions.delay, self._started, event.request_id)

    async def _report_always(self) -> None:
        every, delay = self._conditions.report_seconds, self._conditions.delay + self._conditions.report_delay
        while True:
            report = self._report()
            if report is not None:
                self._later(delay, self._reported, self.replica_id, report)
            await asyncio.sleep(every)

    def _report(self) -> Report | None:
        """Return a report; None if there is nothing new and no sign of life is due."""
        core = self.engine._core
        state = (self._reporter.version, len(core.requests), self._received, self._ended, self._channel)
        self._quiet += 1
        if state == self._last and not core.requests and self._quiet < self._most_quiet:
            return None
        self._last, self._quiet = state, 0
        tiers = self._reporter.version != self._told_version
        self._told_version = self._reporter.version
        return self._reporter.report(
            self._loop.time() + self._skew, received=self._received, ended=self._ended, tiers=tiers
        )

    def _later(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        """Send a message to the door. It is lost if the link is cut when it is sent or when it would
        arrive."""
        if not self._open.is_set():
            return
        channel = self._channel

        def arrive() -> None:
            if self._open.is_set() and self.alive and channel == self._channel:
                call(*args)

        self._loop.call_later(delay, arrive)

    def _made(self, request_id: str) -> int:
        request = self.engine._core.requests.get(request_id)
        return 0 if request is None else request.made_tokens

    def _keep_delivered(self) -> None:
        if self.reachable:
            for request_id, attempt in self.attempts.items():
                attempt.delivered += self._made(request_id)

    def _spawn(self, work: Any, what: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(work, name=f"aioengine-lab-{what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
