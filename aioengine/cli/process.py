"""The program's own signals and standard streams: how a command ends before it is done.

Ctrl-C and output that nobody reads concern the process and not the engine. So only the program ``aioengine``
installs this, before slow imports. Ctrl-C raises nothing in the command: an asynchronous command is cancelled
and unwinds; any other command has nothing to unwind.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141
EXIT_NOT_VALID = 3

GRACE_SECONDS = 3.0
"""A cancelled command that takes longer than this to unwind is not waited for."""

_SHOW_CURSOR = b"\x1b[?25h"


class Process:
    """This process: at most one command runs in it."""

    def __init__(self) -> None:
        self.interrupted = False
        self.hung_up = False
        """Whether SIGHUP has come while a server was starting."""
        self._cancel: Callable[[], object] | None = None

    def install(self) -> None:
        """Take over Ctrl-C and the standard streams."""
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored in a shell's background job
            signal.signal(signal.SIGINT, self._on_interrupt)
        if sys.argv[1:2] == ["serve"]:  # where it means "read the configuration again"
            signal.signal(signal.SIGHUP, self._on_hangup)
        _open_missing_streams()
        # With a buffer whatever PYTHONUNBUFFERED says: what cannot be written stays in it.
        encoding = getattr(sys.stdout, "encoding", "utf-8")
        sys.stdout = open(1, "w", 1, encoding, "replace", closefd=False)  # noqa: SIM115 # until the end

    @contextmanager
    def cancelling(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Context in which an early end calls ``cancel``, which must be safe in a signal handler."""
        self._cancel = cancel
        try:
            yield
        finally:
            self._cancel = None

    def exit(self, code: int) -> NoReturn:
        """End the process with the command's exit code, or with that of its early end."""
        if self.interrupted:
            self._exit_interrupted()  # a thread may still load a model: do not wait for it
        failure = output_failure()
        if failure is None:
            sys.exit(code)
        if failure.errno == errno.EPIPE:  # its reader has gone: nothing is said, as by other tools
            _exit_now(EXIT_BROKEN_PIPE)
        _exit_now(EXIT_FAILED, f"cannot write to standard output: {failure.strerror}")

    def _on_hangup(self, signum: int, frame: FrameType | None) -> None:
        self.hung_up = True

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Cancel the command; exit at once if there is nothing to cancel, or at the second call."""
        if self._cancel is None or self.interrupted:
            self._exit_interrupted()
        self.interrupted = True
        timer = threading.Timer(GRACE_SECONDS, self._exit_interrupted)
        timer.daemon = True
        timer.start()
        self._cancel()

    def _exit_interrupted(self) -> NoReturn:
        _exit_now(EXIT_INTERRUPTED, "interrupted")


def _exit_now(code: int, line: str | None = None) -> NoReturn:
    """Exit without the interpreter's clean-up, which would wait for threads, or unload torch while they use
    it."""
    if line is not None:
        # A live view may have hidden the cursor, and the line may contain "^C".
        before = _SHOW_CURSOR + b"\n" if os.isatty(2) else b""
        writable = select.poll()
        writable.register(2, select.POLLOUT)
        with suppress(OSError):
            if writable.poll(0):  # else it would block: a stopped terminal, or a pipe that nobody reads
                os.write(2, before + f"aioengine: {line}\n".encode())
    os._exit(code)


def output_failure() -> OSError | None:
    """Return why standard output cannot be written; None: it can. (What could not be is kept, and fails
    again.)"""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    except ValueError:  # the command has closed it
        pass
    return None


def _open_missing_streams() -> None:
    """Open the file descriptors 0, 1 and 2 if they are closed, so that no other file or socket gets them. Of
    a missing input nothing can be read; output to a missing one fails, and errors are dropped."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # it is the first that is free, so it is what open returns
            os.open(os.devnull, os.O_RDONLY if fd == 1 else os.O_WRONLY)
            if fd == 2:
                sys.stderr = open(fd, "w", closefd=False)  # noqa: SIM115 # until the end


process = Process()
