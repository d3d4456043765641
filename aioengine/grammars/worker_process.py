"""The engine's side of the worker's life: its start, what it compiles, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import IO, NamedTuple

from aioengine.errors import ConfigError
from aioengine.grammars.limits import GrammarLimits
from aioengine.grammars.matching import Masks
from aioengine.grammars.wire import LENGTH, NOTES, NUMBER, Compile, Compiled, Drop, Hello, Inbox, frame
from aioengine.tasks import end_tasks

START_SECONDS = 60.0
"""Time limit for Python to start and read the tokenizer, even on a very busy machine."""
END_SECONDS = 5.0


class Tokens(NamedTuple):
    """Data from which the worker builds its tokenizer."""

    json: str
    vocab: int
    eos: list[int]


class WorkerProcess:
    """The worker, from :meth:`start` to :meth:`close`; used on one loop. ``ended`` is called when it has
    ended, with the texts that it was busy with."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        masks: Masks,
        doing: int,
        ended: Callable[[set[int]], None],
    ) -> None:
        self.masks = masks
        self.alive = True
        self._doing = doing
        self._process = process
        self._reader, self._writer = streams
        self._ended = ended
        self._inbox = Inbox()
        self._compiles: dict[int, asyncio.Future[Compiled | None]] = {}
        self._listener: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, tokens: Tokens, limits: GrammarLimits, ended: Callable[[set[int]], None]
    ) -> WorkerProcess:
        """Start the worker. If that fails or is cancelled, no process is left. Raises ConfigError if it
        cannot be started, or llguidance does not know this kind of tokenizer."""
        hello = Hello(
            *tokens, limits.compile_seconds, limits.memory, limits.total_memory, limits.mask_seconds
        )
        with contextlib.ExitStack() as open_files:
            ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
            for connection in (*ours, *theirs):
                open_files.enter_context(connection)
            said = open_files.enter_context(tempfile.TemporaryFile())  # a file never blocks who writes to it
            doing = open_files.enter_context(tempfile.TemporaryFile())
            passed = [*(connection.fileno() for connection in theirs), doing.fileno()]
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # no file in the current folder may take the place of a module
                    "-m",
                    "aioengine.grammars.worker",
                    *map(str, passed),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=passed,
                    env=_environment(),
                )
            except OSError as error:
                raise ConfigError(f"guided decoding's process could not be started: {error}") from error
            for connection in theirs:
                connection.close()
            control, masks = (connection.dup() for connection in ours)
            streams = await asyncio.open_connection(sock=control)
            its_masks = Masks(masks, limits.mask_wall_seconds, process.kill)
            worker = cls(process, streams, its_masks, os.dup(doing.fileno()), ended)
            try:
                async with asyncio.timeout(START_SECONDS):
                    why = await worker._greet(hello)
            except TimeoutError:
                why = f"its process did not start within {START_SECONDS:g} s"
            except (EOFError, OSError) as error:
                why = f"its process ended while it started ({_last_line(said) or error})"
            except BaseException:
                await worker.close()
                raise
        if why:
            await worker.close()
            raise ConfigError(f"guided decoding is not possible with this model: {why}")
        worker._listener = asyncio.create_task(worker._listen(), name="aioengine-grammars")
        return worker

    async def _greet(self, hello: Hello) -> str:
        self._writer.write(frame(hello))
        ready = await self._received()
        return ready.why

    async def _received(self) -> Compiled:
        """Wait for a message. Raises EOFError when the worker has ended."""
        head = await self._reader.readexactly(LENGTH.size)
        [message] = self._inbox.add(head + await self._reader.readexactly(*LENGTH.unpack(head)))
        assert isinstance(message, Compiled)
        return message

    async def compile(self, order: Compile) -> Compiled | None:
        """Have a text compiled. None if the worker has ended meanwhile."""
        if not self.alive:
            return None
        done: asyncio.Future[Compiled | None] = asyncio.get_running_loop().create_future()
        self._compiles[order.number] = done
        self._writer.write(frame(order))
        try:
            return await done
        finally:
            del self._compiles[order.number]

    def drop(self, number: int) -> None:
        """Forget a text, or end its compile."""
        if self.alive:
            self._writer.write(frame(Drop(number)))

    async def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = await self._received()
                done = self._compiles.get(message.number)
                if done is not None and not done.done():
                    done.set_result(message)
        self._lose()

    def _lose(self) -> None:
        if self.alive:
            self.alive = False
            self._ended(
                {number for (number,) in NUMBER.iter_unpack(os.pread(self._doing, NOTES * NUMBER.size, 0))}
            )
            os.close(self._doing)
        for done in self._compiles.values():
            if not done.done():
                done.set_result(None)

    async def close(self) -> None:
        """End the worker, and wait for its end. Safe to call twice."""
        if self._listener is not None:
            await end_tasks([self._listener])
        self._lose()
        self.masks.end("the process that follows the grammar has ended")
        self._writer.close()  # that ends it
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def _last_line(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 500))
    return file.read().decode(errors="replace").strip().rpartition("\n")[2]


def _environment() -> dict[str, str]:
    """Return an environment in which the worker finds the same modules as this process."""
    folders = [folder or os.getcwd() for folder in sys.path if isinstance(folder, str)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
