"""The worker process, as the engine sees it: questions, answers, its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe
from queue import SimpleQueue
from typing import Any

from aioengine.errors import ConfigError, EngineOverloaded
from aioengine.grammars import wire

START_SECONDS = 60.0
"""Time limit for Python to start and read the tokenizer, even on a very busy machine."""


LOST = "the process that compiles and follows grammars was lost"


class WorkerLost(EngineOverloaded):
    """The worker, or the child that tried the text, ended for a reason other than the grammar."""

    def __init__(self, what: str = LOST) -> None:
        super().__init__(f"{what}; try again later")


class WorkerProcess:
    """A worker, from :meth:`start` to :meth:`close`. Any thread may ask; one sends, and one receives, so that
    nobody waits who does not want to."""

    def __init__(self) -> None:
        self.alive = True
        self.on_loss: Callable[[int], object] = lambda doing: None
        """Called on a thread when the worker has ended, with the number of the text whose masks it computed
        then, or 0."""
        self._asked: dict[int, Future[Any]] = {}
        self._orders = SimpleQueue[wire.Message | None]()  # as garbage is collected, others may be put
        self._connection, theirs = Pipe()
        self._notes = tempfile.TemporaryFile()  # noqa: SIM115
        """What the worker says while it starts, and then the text whose masks it computes."""
        folders = [folder or os.getcwd() for folder in sys.path if isinstance(folder, str)]
        with theirs:
            self._process = subprocess.Popen(
                # Without -P a file in the current folder might take the place of a module.
                [sys.executable, "-P", "-m", "aioengine.grammars.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._notes,
                stderr=self._notes,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            )
        self._receiver = threading.Thread(target=self._receive, name="aioengine-grammars", daemon=True)
        self._receiver.start()
        threading.Thread(target=self._send, name="aioengine-grammars-send", daemon=True).start()

    @classmethod
    async def start(cls, hello: wire.Hello) -> WorkerProcess:
        """Start a worker. If that fails or is cancelled, no process is left. Raises ConfigError if it cannot
        be started, or llguidance does not know this kind of tokenizer."""
        try:
            worker = cls()
        except OSError as error:
            raise ConfigError(f"guided decoding's process could not be started: {error}") from error
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.wrap_future(worker.ask(hello))
            return worker
        except BaseException as error:
            await worker.close()
            if not isinstance(error, TimeoutError | WorkerLost):
                raise
            worker._notes.seek(0)
            [*_, last] = ["", *worker._notes.read().decode(errors="replace").strip().splitlines()]
            raise ConfigError(
                "guided decoding is not possible with this model: its process has ended, or took more than "
                f"{START_SECONDS:g} s to start ({last[-500:] or 'it said nothing'})"
            ) from None

    def ask(self, question: wire.Question) -> Future[Any]:
        """Ask; the answer raises :class:`WorkerLost` if the worker has ended."""
        answer = self._asked[question.number] = Future[Any]()
        self._orders.put(question)
        if not self.alive:
            self._lose(question.number)
        return answer

    def tell(self, order: wire.Drop) -> None:
        """Give an order that has no answer. The garbage collector may call it, on any thread at any
        moment."""
        self._orders.put(order)

    def kill(self) -> None:
        self._process.kill()

    async def close(self) -> None:
        """End the worker, and wait for its end. Safe to call twice."""
        self.kill()
        await asyncio.to_thread(self._receiver.join)

    def _send(self) -> None:
        while (order := self._orders.get()) is not None:
            orders = [order]
            while not self._orders.empty():
                if (more := self._orders.get()) is None:
                    return
                orders.append(more)
            with suppress(OSError):  # it has ended, which the other thread notes
                self._connection.send_bytes(wire.encode(orders))

    def _receive(self) -> None:
        try:
            while True:
                for answer in wire.answers.decode(self._connection.recv_bytes()):
                    asked = self._asked.pop(answer.number)
                    if asked.set_running_or_notify_cancel():
                        asked.set_result(answer)
        except (EOFError, OSError):
            pass
        finally:
            self.alive = False
            self._process.kill()
            self._process.wait()
            for number in list(self._asked):
                self._lose(number)
            self._orders.put(None)
            doing = os.pread(self._notes.fileno(), wire.TEXT.size, 0)
            with suppress(RuntimeError):  # the loop is closed, and the engine gone
                self.on_loss(*wire.TEXT.unpack(doing) if len(doing) == wire.TEXT.size else (0,))

    def _lose(self, number: int) -> None:
        asked = self._asked.pop(number, None)
        if asked is not None and asked.set_running_or_notify_cancel():
            asked.set_exception(WorkerLost())
