"""The worker processes of one engine, from start to end: if one is lost, all are ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

import msgspec

from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError, ConfigError, DeviceError, EngineDead
from aioengine.executors.process import wire
from aioengine.executors.process.spawn import WorkerConnection, spawn
from aioengine.memory_plan import MemoryPlan
from aioengine.tasks import Background, run_to_completion

CLOSE_SECONDS = 5.0
"""Time after which workers that have not ended are killed."""
EXIT_SECONDS = 1.0
"""How long to wait for the exit status of a worker whose connection has ended."""
BLAME_SECONDS = 0.1
"""Time to wait for another rank's death, which may be the cause when a rank fails in a step."""

A = TypeVar("A")


@dataclass(eq=False, slots=True)
class _Call:
    """An open question of :meth:`Workers.call`."""

    kind: Any
    answered: Callable[[Any], None]
    moved: Callable[[], None] | None
    found: dict[int, Any] = field(default_factory=dict)
    error: Exception | None = None


class Workers:
    """The workers, which are started once and closed once. All methods are called on one loop.

    Args:
        config: The engine's configuration; ``model`` is a path.
        lost: Called once, with EngineDead, if a worker ends or a step fails after the start. By then all
            workers have been killed, and all open calls fail with the same error.
    """

    def __init__(self, config: EngineConfig, lost: Callable[[EngineDead], None]) -> None:
        self.size = config.tensor_parallel_size
        self.dead: AioEngineError | None = None
        self.started = False
        """Whether they have their model and its KV cache, and take requests."""
        self._config = config
        self._lost = lost
        self._workers: list[WorkerConnection] = []
        self._inquiries = Background()
        """Look for the reasons of failures."""
        self._calls: dict[int, _Call] = {}
        self._numbers = count()
        self._closing = False

    # Life

    async def start(self, num_blocks: int | None = None) -> tuple[MemoryPlan, str, str | None]:
        """Start the workers. Returns rank 0's memory plan with the number of KV blocks of all ranks:
        ``num_blocks`` or, if that is None, as many as all have room for; and ``kernels`` and ``variance`` of
        a :class:`~aioengine.executors.base.Device`.

        Raises ConfigError if the model is not available or does not fit, and EngineDead if a worker ends. If
        it fails or is cancelled, no process is left.
        """
        folder = tempfile.TemporaryDirectory(prefix="aioengine-") if self.size > 1 else nullcontext("")
        with folder as path:  # of the file by which the ranks find each other
            try:
                rendezvous = await run_to_completion(self._spawn(path))
                plans: list[MemoryPlan] = await self.ask(wire.Start(self._config, rendezvous), MemoryPlan)
                blocks = min(plan.num_blocks for plan in plans) if num_blocks is None else num_blocks
                [(kernels, variance), *_] = await self.ask(wire.Build(blocks), tuple[str, str | None])
            except BaseException:
                self._kill()
                await self.close()
                raise
        self.started = True
        return msgspec.structs.replace(plans[0], num_blocks=blocks), kernels, variance

    async def close(self) -> None:
        """End all workers, and wait until they have ended. Safe to call twice."""
        await run_to_completion(self._close())

    async def _close(self) -> None:
        self._closing = True
        for worker in self._workers:
            worker.transport.close()  # each ends with its connection
        ends = [asyncio.ensure_future(worker.process.wait()) for worker in self._workers]
        if ends:
            _, late = await asyncio.wait(ends, timeout=CLOSE_SECONDS)
            if late:
                self._kill()
                await asyncio.wait(late, timeout=CLOSE_SECONDS)
        await self._inquiries.end()
        self._workers.clear()

    async def _spawn(self, folder: str) -> str:
        """Start the processes. Returns the file in ``folder`` by which the ranks find each other; "" for one
        rank."""
        if sys.platform == "win32" or not sys.executable:
            raise ConfigError("executor='process': needs a POSIX system and sys.executable; use 'thread'")
        spawning = (spawn(rank, self._received, self._ended) for rank in range(self.size))
        found = await asyncio.gather(*spawning, return_exceptions=True)
        self._workers += [worker for worker in found if isinstance(worker, WorkerConnection)]
        for result in found:
            if isinstance(result, BaseException):
                raise EngineDead(f"a worker process could not be started: {result}") from result
        return folder and os.path.join(folder, "ranks")

    # Asking

    def call(
        self,
        message: wire.Message,
        kind: Any,
        answered: Callable[[Any], None],
        moved: Callable[[], None] | None = None,
    ) -> None:
        """Send a message to all workers, each of which answers with a ``kind``. ``answered`` is called with
        the answers by rank, or the first failure, when all have answered or are lost; ``moved`` when a worker
        reports that it goes on. Raises the error of their loss, if they were lost."""
        if self.dead is not None:
            raise self.dead
        number = next(self._numbers)
        self._calls[number] = _Call(kind, answered, moved)
        self._send(wire.Request(number, message))

    def ask(
        self, message: wire.Message, kind: Any, moved: Callable[[], None] | None = None
    ) -> asyncio.Future[list[Any]]:
        """Do what :meth:`call` does, and return a future of the answers."""
        answers: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.call(message, kind, partial(_settle, answers), moved)
        return answers

    def tell(self, message: wire.Message) -> None:
        """Send a message that has no answer to all workers."""
        if self.dead is None:
            self._send(wire.Request(-1, message))

    def _send(self, request: wire.Request) -> None:
        data = wire.frame(request)
        for worker in self._workers:
            worker.transport.write(data)

    # Listening

    def _received(self, worker: WorkerConnection, message: bytes) -> None:
        try:
            match wire.reports.decode(message):
                case wire.Answer(number, value):
                    self._answered(worker.rank, number, value)
                case wire.Failed(None, error):
                    self._inquiries.spawn(self._broke(worker, wire.unpack_error(error)))
                case wire.Failed(int() as number, error):
                    self._answered(worker.rank, number, wire.unpack_error(error))
                case wire.Reading(number):
                    call = self._calls.get(number)
                    if call is not None and call.moved is not None:
                        call.moved()
        except Exception as error:
            self._fail(_dead(f"{_who(worker)}: {type(error).__name__}: {error}", error))

    def _answered(self, rank: int, number: int, answer: msgspec.Raw | Exception) -> None:
        call = self._calls.get(number)
        if call is None:  # the workers are lost
            return
        if isinstance(answer, Exception):
            call.found[rank] = None
            call.error = call.error or answer
        else:
            call.found[rank] = msgspec.msgpack.decode(answer, type=call.kind)
        if len(call.found) == self.size:
            del self._calls[number]
            call.answered(call.error or [call.found[rank] for rank in range(self.size)])

    def _ended(self, worker: WorkerConnection) -> None:
        if self.dead is None and not self._closing:
            self._inquiries.spawn(self._why_ended(worker))

    async def _broke(self, worker: WorkerConnection, error: Exception) -> None:
        if isinstance(error, AioEngineError) and not self.started:
            self._fail(error)
            return
        text = str(error)
        if self.size > 1:
            await asyncio.sleep(BLAME_SECONDS)
            text = f"{_who(worker)}: {error}"
        self._fail(type(error)(text) if isinstance(error, DeviceError) else _dead(text, error))

    async def _why_ended(self, worker: WorkerConnection) -> None:
        status: int | str | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                status = await worker.process.wait()
        self._fail(_dead(f"{_who(worker)} {_how_it_ended(status)}"))

    def _fail(self, error: AioEngineError) -> None:
        if self.dead is not None or self._closing:
            return
        self.dead = error
        self._kill()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.answered(error)
        if self.started and isinstance(error, EngineDead):
            self._lost(error)

    def _kill(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()


def _settle(answers: asyncio.Future[list[A]], result: list[A] | Exception) -> None:
    if answers.done():
        return  # nobody waits for them any more
    if isinstance(result, Exception):
        answers.set_exception(result)
        answers.exception()  # as above
    else:
        answers.set_result(result)


def _dead(reason: str, cause: Exception | None = None) -> EngineDead:
    error = EngineDead(f"the engine failed: {reason}")
    error.__cause__ = cause
    return error


def _who(worker: WorkerConnection) -> str:
    return f"worker {worker.rank} (process {worker.process.pid})"


def _how_it_ended(status: int | str | None) -> str:
    if status is None:
        return "closed its connection"
    if isinstance(status, str):
        return status
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    short = "; the system does that when memory is short" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{short}"
