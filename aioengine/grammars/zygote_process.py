"""The engine's side of the zygote."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from array import array
from itertools import count
from typing import IO

from aioengine.errors import ConfigError
from aioengine.grammars.limits import GrammarLimits
from aioengine.grammars.places import Places
from aioengine.grammars.wire import EXITED, HELLO, KILL, LENGTH, ORDER, START, text_frame
from aioengine.runtime.tasks import end_tasks

START_SECONDS = 60.0
"""Time limit for Python to start and read the tokenizer, even on a very busy machine."""
END_SECONDS = 5.0


class Tokens:
    """Data from which the zygote builds its tokenizer."""

    def __init__(self, json: str, vocab: int, eos: list[int]) -> None:
        self.json = json
        self.vocab = vocab
        self.eos = eos


class ChildProcess:
    """A child, and the engine's end of its socket. Used on the loop."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        self.number = number
        self.connection = connection
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """Exit status, or minus the signal that killed it; None if unknown, because the zygote has died."""


class ZygoteProcess:
    """The zygote process, from :meth:`start` to :meth:`close`; used on one loop."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket, places: Places) -> None:
        self.places = places
        """Shared memory in which its children write masks; closed with it."""
        self._process = process
        self._control = control
        self._numbers = count()
        self._children: dict[int, ChildProcess] = {}
        self._listener: asyncio.Task[None] | None = None
        self.alive = True

    @classmethod
    async def start(cls, tokens: Tokens, num_places: int, width: int) -> ZygoteProcess:
        """Start the zygote, with ``count`` places of ``width`` bytes. If it fails or is cancelled, no process
        is left. Raises ConfigError if it cannot be started, or llguidance does not know this kind of
        tokenizer."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        places = Places(num_places, width)
        said = tempfile.TemporaryFile()  # noqa: SIM115 # a file never blocks who writes to it
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # no file in the current folder may take the place of a module
                    "-m",
                    "aioengine.grammars.zygote",
                    str(theirs.fileno()),
                    str(places.file),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=[theirs.fileno(), places.file],
                    env=_environment(),
                )
        except BaseException as error:
            ours.close()
            places.close()
            said.close()
            if isinstance(error, OSError):
                raise ConfigError(f"guided decoding's process could not be started: {error}") from error
            raise
        zygote = cls(process, ours, places)
        try:
            async with asyncio.timeout(START_SECONDS):
                why = await zygote._greet(tokens)
        except TimeoutError:
            why = f"its process did not start within {START_SECONDS:g} s"
        except (EOFError, OSError) as error:
            why = f"its process ended while it started ({_last_line(said) or error})"
        except BaseException:
            await zygote.close()
            raise
        finally:
            said.close()
        if why:
            await zygote.close()
            raise ConfigError(f"guided decoding is not possible with this model: {why}")
        loop = asyncio.get_running_loop()
        zygote._listener = loop.create_task(zygote._listen(), name="aioengine-grammars")
        return zygote

    async def _greet(self, tokens: Tokens) -> str:
        loop = asyncio.get_running_loop()
        hello = HELLO.pack(tokens.vocab, self.places.width, self.places.size, len(tokens.eos))
        await loop.sock_sendall(
            self._control, hello + array("i", tokens.eos).tobytes() + text_frame(tokens.json)
        )
        return await read_text(self._control)

    def fork(self, limits: GrammarLimits, *, compile_seconds: float, nice: int) -> ChildProcess:
        """Fork a child. Raises OSError if the zygote has died or is overloaded."""
        number = next(self._numbers) % 2**32
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                order = ORDER.pack(START, number, compile_seconds, limits.mask_seconds, limits.memory, nice)
                socket.send_fds(self._control, [order], [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        child = self._children[number] = ChildProcess(number, ours)
        return child

    def kill(self, child: ChildProcess) -> None:
        if self.alive and not child.exited.done():
            with contextlib.suppress(OSError):
                self._control.send(ORDER.pack(KILL, child.number, 0, 0, 0, 0))

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, EOFError):
            while True:
                data = await _exactly(loop, self._control, EXITED.size)
                number, status = EXITED.unpack(data)
                child = self._children.pop(number)
                if not child.exited.done():
                    child.exited.set_result(status)
        self._lose_all()

    def _lose_all(self) -> None:
        self.alive = False
        children, self._children = self._children, {}
        for child in children.values():
            if not child.exited.done():
                child.exited.set_result(None)

    async def close(self) -> None:
        """End the zygote and its children, and wait for its end. Safe to call twice."""
        if self._control.fileno() < 0:
            return
        if self._listener is not None:
            await end_tasks([self._listener])
        self._lose_all()
        self._control.close()  # that ends it
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self.places.close()


def _last_line(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 500))
    return file.read().decode(errors="replace").strip().rpartition("\n")[2]


async def read_text(connection: socket.socket) -> str:
    """Read a text. Raises EOFError if the other end closes first."""
    loop = asyncio.get_running_loop()
    (length,) = LENGTH.unpack(await _exactly(loop, connection, LENGTH.size))
    return (await _exactly(loop, connection, length)).decode()


async def read_struct(connection: socket.socket, size: int) -> bytes:
    """Read ``size`` bytes. Raises EOFError if the other end closes first."""
    return await _exactly(asyncio.get_running_loop(), connection, size)


async def _exactly(loop: asyncio.AbstractEventLoop, connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await loop.sock_recv(connection, size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _environment() -> dict[str, str]:
    """Return an environment in which the zygote finds the same modules as this process."""
    folders = [folder or os.getcwd() for folder in sys.path if isinstance(folder, str)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
