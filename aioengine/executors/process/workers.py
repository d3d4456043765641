"""The worker processes of one engine, from start to end: if one is lost, all are ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from typing import TypeVar

import msgspec

from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError, ConfigError, DeviceError, EngineDead
from aioengine.executors.process import wire
from aioengine.executors.process.spawn import WorkerConnection, spawn
from aioengine.info import LoadProgress
from aioengine.model.cuda.failures import device_error_in
from aioengine.runtime.tasks import run_to_completion

CLOSE_SECONDS = 5.0
"""Time after which workers that have not ended are killed."""
EXIT_SECONDS = 1.0
"""How long to wait for the exit status of a worker whose connection has ended."""
BLAME_SECONDS = 0.1
"""Time to wait for another rank's death, which may be the cause when a rank fails in a step."""

A = TypeVar("A", bound=wire.Answer)


class Call:
    """A request to all workers. ``answers`` has one answer by rank, or the first failure. A failure is set at
    once or, if the call is ``patient``, when all have answered."""

    def __init__(self, number: int, size: int, *, patient: bool) -> None:
        self.number = number
        self.answers: asyncio.Future[list[wire.Answer]] = asyncio.get_running_loop().create_future()
        self.all_answered: Callable[[], None] = _nothing
        self.moved: Callable[[], None] = _nothing
        """Called when a worker reports progress."""
        self._patient = patient
        self._found: dict[int, wire.Answer] = {}
        self._size = size
        self._failure: Exception | None = None

    @property
    def open(self) -> bool:
        """Whether a worker has not answered yet."""
        return len(self._found) < self._size

    def answer(self, rank: int, answer: wire.Answer) -> None:
        self._found[rank] = answer
        if isinstance(answer, wire.Failed) and self._failure is None:
            self._failure = answer.error.error()
        if self._failure is not None and not (self._patient and self.open):
            self.fail(self._failure)
        elif not self.open and not self.answers.done():
            self.answers.set_result([self._found[rank] for rank in range(self._size)])
        if not self.open:
            self.all_answered()

    def fail(self, error: Exception) -> None:
        if not self.answers.done():
            self.answers.set_exception(error)

    async def of(self, kind: type[A]) -> list[A]:
        """Wait for the answers, by rank; each is a ``kind``. Raises the first failure, or EngineDead."""
        answers = await self.answers
        found: list[A] = [answer for answer in answers if isinstance(answer, kind)]
        assert len(found) == len(answers), f"expected {kind.__name__}, not {answers}"
        return found


class Workers:
    """The workers, which are started once and closed once. All methods are called on one loop.

    Args:
        config: The engine's configuration; ``model`` is a path.
        lost: Called once, with EngineDead, if a worker ends or a step fails after the start. By then all
            workers have been killed, and all open calls fail with the same error.
        progress: Called with the progress of reading rank 0's weights.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        lost: Callable[[EngineDead], None],
        progress: LoadProgress | None = None,
    ) -> None:
        self.size = config.tensor_parallel_size
        self.dead: AioEngineError | None = None
        self._config = config
        self._lost = lost
        self._progress = progress
        self.kernels = ""
        """Names of the kernels that compute the steps; known when the workers have started."""
        self.variance: str | None = None
        """Why a token's bits depend on its batch; known when the workers have started."""
        self._workers: list[WorkerConnection] = []
        self._listeners: list[asyncio.Task[None]] = []
        self._calls: dict[int, Call] = {}
        self._numbers = count()
        self._device = ""
        """Kind of device of the ranks, "cpu" or "cuda"; known when they have planned."""
        self.started = False
        """Whether they have their model and its KV cache, and take requests."""
        self._closing = False

    # Life

    async def start(self, num_blocks: int | None = None) -> tuple[msgspec.Raw, int]:
        """Start the workers. Returns rank 0's memory plan (in msgpack) and the number of KV blocks:
        ``num_blocks`` or, if that is None, as many as all ranks have room for.

        Raises ConfigError if the model is not available or does not fit, and EngineDead if a worker ends. If
        it fails or is cancelled, no process is left.
        """
        folder = tempfile.mkdtemp(prefix="aioengine-") if self.size > 1 else None
        try:
            await run_to_completion(self._spawn())
            plans = await self._start(self._meeting(folder)).of(wire.Planned)
            self._device = device_of(plans[0].plan)
            if folder is not None:
                shutil.rmtree(folder)  # they have found each other
                folder = None
            blocks = min(plan.num_blocks for plan in plans) if num_blocks is None else num_blocks
            built = await self.ask(lambda number: wire.Build(number, blocks)).of(wire.Done)
            self.kernels, self.variance = built[0].kernels, built[0].variance
        except BaseException:
            self._kill()
            await self.close()
            raise
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        self.started = True
        return plans[0].plan, blocks

    async def close(self) -> None:
        """End all workers, and wait until they have ended. Safe to call twice."""
        await run_to_completion(self._close())

    async def _close(self) -> None:
        self._closing = True
        for worker in self._workers:
            worker.writer.close()  # each ends with its connection
        ends = [asyncio.ensure_future(worker.process.wait()) for worker in self._workers]
        if ends:
            _, late = await asyncio.wait(ends, timeout=CLOSE_SECONDS)
            if late:
                self._kill()
                await asyncio.wait(late, timeout=CLOSE_SECONDS)
        for listener in self._listeners:
            listener.cancel()
        await asyncio.gather(
            *self._listeners,
            *(worker.output.ended() for worker in self._workers if worker.output is not None),
            return_exceptions=True,
        )
        self._workers.clear()
        self._listeners.clear()

    async def _spawn(self) -> None:
        if sys.platform == "win32" or not sys.executable:
            raise ConfigError("executor='process': needs a POSIX system and sys.executable; use 'thread'")
        spawning = (spawn(rank) for rank in range(self.size))
        found = await asyncio.gather(*spawning, return_exceptions=True)
        for worker in found:
            if isinstance(worker, WorkerConnection):
                self._add(worker)
        for result in found:
            if isinstance(result, BaseException):
                raise EngineDead(f"a worker process could not be started: {result}") from result

    def _add(self, worker: WorkerConnection) -> None:
        """Listen to a worker from now on."""
        self._workers.append(worker)
        name = f"aioengine-worker-{worker.rank}"
        self._listeners.append(asyncio.get_running_loop().create_task(self._listen(worker), name=name))

    def _meeting(self, folder: str | None) -> str:
        """Return the file in ``folder`` by which the ranks find each other; "" for one rank."""
        return "" if folder is None else os.path.join(folder, "ranks")

    def _start(self, meeting: str) -> Call:
        threads = rank_threads(self.size)
        return self.ask_each(
            lambda number, rank: wire.Start(number, self._config, rank, self.size, threads, meeting)
        )

    # Asking

    def ask(self, make: Callable[[int], wire.Request], *, patient: bool = False) -> Call:
        """Send the request ``make(number)`` to all workers. Raises the error of their loss, if they were
        lost."""
        call = self._open(patient=patient)
        self.tell(make(call.number))
        return call

    def ask_each(self, make: Callable[[int, int], wire.Request]) -> Call:
        """Send the request ``make(number, rank)`` to each worker. Raises as ``ask``."""
        call = self._open(patient=False)
        for worker in self._workers:
            worker.writer.write(wire.frame(make(call.number, worker.rank)))
        return call

    def tell(self, message: wire.Request) -> None:
        """Send a message that has no answer to all workers."""
        if self.dead is None:
            data = wire.frame(message)
            for worker in self._workers:
                worker.writer.write(data)

    async def flush(self) -> None:
        """Wait until the buffers of unsent messages are small enough."""
        for worker in self._workers:
            with contextlib.suppress(ConnectionError):  # its listener reports that, too
                await worker.writer.drain()

    def _open(self, *, patient: bool) -> Call:
        if self.dead is not None:
            raise self.dead
        call = Call(next(self._numbers), self.size, patient=patient)
        self._calls[call.number] = call
        return call

    # Listening

    async def _listen(self, worker: WorkerConnection) -> None:
        try:
            while True:
                await self._received(worker, await wire.read_report(worker.reader))
        except (EOFError, ConnectionError):
            await self._ended(worker)
        except Exception as error:
            self._fail(_dead(f"{_who(worker)}: {type(error).__name__}: {error}", error))

    async def _received(self, worker: WorkerConnection, report: wire.Report) -> None:
        if isinstance(report, wire.Progress):
            if self._progress is not None:
                self._progress(report.stage, report.done, report.total)
        elif isinstance(report, wire.Broken):
            error = report.error.error()
            if isinstance(error, AioEngineError) and not self.started:
                self._fail(error)
                return
            if self.size > 1:
                await asyncio.sleep(BLAME_SECONDS)
            if isinstance(error, DeviceError):
                self._fail(error if self.size == 1 else type(error)(f"{_who(worker)}: {error}"))
                return
            self._fail(_dead(str(error) if self.size == 1 else f"{_who(worker)}: {error}", error))
        elif isinstance(report, wire.Reading):
            self._calls[report.number].moved()
        else:
            call = self._calls[report.number]
            call.answer(worker.rank, report)
            if not call.open:
                del self._calls[report.number]

    async def _ended(self, worker: WorkerConnection) -> None:
        code: int | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                code = await worker.process.wait()
        dead = f"{_who(worker)} {_how_it_ended(code)}"
        said = None
        aborted = self._device == "cuda" and code != -signal.SIGKILL
        if aborted and worker.output is not None:  # NCCL and the driver abort the process
            await worker.output.ended()
            said = device_error_in(list(worker.output.last))
        self._fail(_dead(dead) if said is None else type(said)(f"{dead}: {said}"))

    def _fail(self, error: AioEngineError) -> None:
        if self.dead is not None or self._closing:
            return
        self.dead = error
        self._kill()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(error)
        if self.started and isinstance(error, EngineDead):
            self._lost(error)

    def _kill(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()


class _Planned(msgspec.Struct):
    """The part of a memory plan that matters here."""

    device: str


def device_of(plan: msgspec.Raw) -> str:
    """Return the device of a memory plan in msgpack."""
    return msgspec.msgpack.decode(plan, type=_Planned).device


def rank_threads(size: int) -> int:
    """Return a worker's share of the compute threads of this process; 0 if torch is not loaded here."""
    if "torch" not in sys.modules:
        return 0
    from aioengine.model.parallel.threads import rank_threads as share

    return share(size)


def _dead(reason: str, cause: Exception | None = None) -> EngineDead:
    error = EngineDead(f"the engine failed: {reason}")
    error.__cause__ = cause
    return error


def _who(worker: WorkerConnection) -> str:
    return f"worker {worker.rank} (process {worker.process.pid})"


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    short = "; the system does that when memory is short" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{short}"


def _nothing() -> None:
    pass
