"""The worker processes of one engine, from start to end: if one is lost, all are ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import nullcontext
from itertools import count
from typing import Any, Generic, TypeVar

import msgspec

from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError, ConfigError, DeviceError, EngineDead
from aioengine.executors.process import wire
from aioengine.executors.process.spawn import WorkerConnection, spawn
from aioengine.info import LoadProgress
from aioengine.memory_plan import MemoryPlan
from aioengine.model.cuda.failures import device_error_in
from aioengine.runtime.tasks import run_to_completion

CLOSE_SECONDS = 5.0
"""Time after which workers that have not ended are killed."""
EXIT_SECONDS = 1.0
"""How long to wait for the exit status of a worker whose connection has ended."""
BLAME_SECONDS = 0.1
"""Time to wait for another rank's death, which may be the cause when a rank fails in a step."""

A = TypeVar("A")


class Call(Generic[A]):
    """A request to all workers, each of which answers with a ``kind``. Awaiting it gives the answers by rank,
    or raises the first failure, which may be before the others have answered."""

    def __init__(self, number: int, kind: type[A], size: int) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.moved: Callable[[], None] = _nothing
        """Called when a worker reports that it goes on."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when all have answered, or are lost."""
        self._answers: asyncio.Future[list[A]] = loop.create_future()
        self._kind: Any = kind
        self._found: dict[int, A] = {}
        self.left = size
        """Number of workers that have not answered yet."""

    def __await__(self) -> Generator[Any, None, list[A]]:
        return self._answers.__await__()

    def answer(self, rank: int, report: wire.Answer | wire.Failed) -> None:
        self.left -= 1
        if isinstance(report, wire.Answer):
            self._found[rank] = msgspec.msgpack.decode(report.value, type=self._kind)
            if not self.left and not self._answers.done():
                self._answers.set_result([self._found[rank] for rank in sorted(self._found)])
        else:
            self._fail(wire.unpack_error(report.error))
        if not self.left:
            self._end()

    def lose(self, error: Exception) -> None:
        """Fail, because the workers are lost."""
        self._fail(error)
        self._end()

    def _fail(self, error: Exception) -> None:
        if not self._answers.done():
            self._answers.set_exception(error)
            self._answers.exception()  # nobody may wait for it any more

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


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
        self.device = ""
        """Kind of device of the ranks, "cpu" or "cuda"; known when they have planned."""
        self._workers: list[WorkerConnection] = []
        self._listeners: list[asyncio.Task[None]] = []
        self._calls: dict[int, Call[Any]] = {}
        self._numbers = count()
        self.started = False
        """Whether they have their model and its KV cache, and take requests."""
        self._closing = False

    # Life

    async def start(self, num_blocks: int | None = None) -> MemoryPlan:
        """Start the workers. Returns rank 0's memory plan with the number of KV blocks of all ranks:
        ``num_blocks`` or, if that is None, as many as all have room for.

        Raises ConfigError if the model is not available or does not fit, and EngineDead if a worker ends. If
        it fails or is cancelled, no process is left.
        """
        folder = tempfile.TemporaryDirectory(prefix="aioengine-") if self.size > 1 else nullcontext("")
        with folder as path:  # of the file by which the ranks find each other
            try:
                await run_to_completion(self._spawn())
                plans = await self._start(self._meeting(path))
                self.device = plans[0].device
                blocks = min(plan.num_blocks for plan in plans) if num_blocks is None else num_blocks
                built = await self.ask(wire.Build(blocks), wire.Built)
            except BaseException:
                self._kill()
                await self.close()
                raise
        self.kernels, self.variance = built[0].kernels, built[0].variance
        self.started = True
        return msgspec.structs.replace(plans[0], num_blocks=blocks)

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

    def _meeting(self, folder: str) -> str:
        """Return the file in ``folder`` by which the ranks find each other; "" for one rank."""
        return folder and os.path.join(folder, "ranks")

    def _start(self, meeting: str) -> Call[MemoryPlan]:
        call = self._open(MemoryPlan)
        threads = rank_threads(self.size)
        for worker in self._workers:
            start = wire.Start(self._config, worker.rank, self.size, threads, meeting)
            worker.writer.write(wire.frame(wire.Request(call.number, start)))
        return call

    # Asking

    def ask(self, message: wire.Message, kind: type[A]) -> Call[A]:
        """Send a message to all workers, each of which answers with a ``kind``. Raises the error of their
        loss, if they were lost."""
        call = self._open(kind)
        self._send(wire.Request(call.number, message))
        return call

    def tell(self, message: wire.Message) -> None:
        """Send a message that has no answer to all workers."""
        if self.dead is None:
            self._send(wire.Request(-1, message))

    def _send(self, request: wire.Request) -> None:
        data = wire.frame(request)
        for worker in self._workers:
            worker.writer.write(data)

    async def flush(self) -> None:
        """Wait until the buffers of unsent messages are small enough."""
        for worker in self._workers:
            with contextlib.suppress(ConnectionError):  # its listener reports that, too
                await worker.writer.drain()

    def _open(self, kind: type[A]) -> Call[A]:
        if self.dead is not None:
            raise self.dead
        call = Call(next(self._numbers), kind, self.size)
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
        match report:
            case wire.Answer() | wire.Failed():
                call = self._calls[report.number]
                call.answer(worker.rank, report)
                if not call.left:
                    del self._calls[report.number]
            case wire.Reading():
                self._calls[report.number].moved()
            case wire.Progress():
                if self._progress is not None:
                    self._progress(report.stage, report.done, report.total)
            case wire.Broken():
                await self._broke(worker, wire.unpack_error(report.error))

    async def _broke(self, worker: WorkerConnection, error: Exception) -> None:
        if isinstance(error, AioEngineError) and not self.started:
            self._fail(error)
            return
        text = str(error)
        if self.size > 1:
            await asyncio.sleep(BLAME_SECONDS)
            text = f"{_who(worker)}: {error}"
        self._fail(type(error)(text) if isinstance(error, DeviceError) else _dead(text, error))

    async def _ended(self, worker: WorkerConnection) -> None:
        code: int | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                code = await worker.process.wait()
        dead = f"{_who(worker)} {_how_it_ended(code)}"
        said = None
        aborted = self.device == "cuda" and code != -signal.SIGKILL
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
            call.lose(error)
        if self.started and isinstance(error, EngineDead):
            self._lost(error)

    def _kill(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()


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
