"""The program's own signals and standard streams: how a command ends before it is done.

Ctrl-C and output that nobody reads concern the process and not the engine. So only the program ``aioengine``
installs this, before slow imports. Nothing here raises into the command: an asynchronous command is cancelled
and unwinds; any other command has nothing to unwind.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TextIO

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141
EXIT_NOT_VALID = 3

GRACE_SECONDS = 3.0
"""A cancelled command that takes longer than this to unwind is not waited for."""

_SHOW_CURSOR = b"\x1b[?25h"


class Ending(NamedTuple):
    """Why a command ends early."""

    code: int
    line: str | None
    """Line for standard error; None: print nothing, as other tools do when their reader has gone."""


INTERRUPTED = Ending(EXIT_INTERRUPTED, "interrupted")
NOBODY_READS = Ending(EXIT_BROKEN_PIPE, None)


class Process:
    """This process: at most one command runs in it."""

    def __init__(self) -> None:
        self.ending: Ending | None = None
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
        sys.stdout = _guarded(sys.stdout, 1, self._on_output_error)
        sys.stderr = _guarded(sys.stderr, 2, lambda error: None)

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
        with suppress(ValueError):  # the command has closed it
            sys.stdout.flush()
        if self.ending is None:
            sys.exit(code)
        self._exit_now(self.ending)  # a thread may still load a model: do not wait for it

    def _on_hangup(self, signum: int, frame: FrameType | None) -> None:
        self.hung_up = True

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._end(INTERRUPTED, at_once=True)

    def _on_output_error(self, error: OSError) -> None:
        failed = Ending(EXIT_FAILED, f"cannot write to standard output: {error.strerror}")
        self._end(NOBODY_READS if error.errno == errno.EPIPE else failed, at_once=False)

    def _end(self, ending: Ending, *, at_once: bool) -> None:
        """Cancel the command. If there is nothing to cancel, or at the second call, exit if ``at_once``; else
        let the command end."""
        if at_once and (self._cancel is None or self.ending == ending):
            self._exit_now(ending)
        if self.ending is not None:
            return
        self.ending = ending
        if self._cancel is not None:
            timer = threading.Timer(GRACE_SECONDS, self._exit_now, [ending])
            timer.daemon = True
            timer.start()
            self._cancel()

    def _exit_now(self, ending: Ending) -> NoReturn:
        """Exit without the interpreter's clean-up, which would wait for threads, or unload torch while they
        use it."""
        if ending.line is not None:
            interactive = os.isatty(2)
            # A live view may have hidden the cursor, and the line may contain "^C".
            before = _SHOW_CURSOR + b"\n" if interactive else b""
            writable = select.poll()
            writable.register(2, select.POLLOUT)
            with suppress(OSError):
                if writable.poll(0):  # else it would block: a stopped terminal, or a pipe that nobody reads
                    os.write(2, before + f"aioengine: {ending.line}\n".encode())
        os._exit(ending.code)


class _GuardedFile(io.FileIO):
    """A stream that reports its first failed write, and drops everything from then on."""

    def __init__(self, fd: int, report: Callable[[OSError], None]) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._report = report
        self._failed = False

    def write(self, data, /):  # type: ignore[no-untyped-def] # typeshed's buffer type is not public
        if not self._failed:
            try:
                return super().write(data)
            except OSError as error:
                self._failed = True
                self._report(error)
        return memoryview(data).nbytes


def _guarded(stream: TextIO | Any, fd: int, report: Callable[[OSError], None]) -> io.TextIOWrapper:
    """Return ``stream`` (None if there is none) over a guarded file, with the same encoding and buffering."""
    return io.TextIOWrapper(
        io.BufferedWriter(_GuardedFile(fd, report)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace" if fd == 2 else "replace",
        line_buffering=fd == 2 or os.isatty(fd),
        write_through=getattr(stream, "write_through", False),
    )


def _open_missing_streams() -> None:
    """Open the file descriptors 0, 1 and 2 if they are closed, so that no other file or socket gets them.

    A missing input is opened for writing, and a missing output for reading, so that using them fails.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # it is the first that is free, so it is what open returns
            os.open(os.devnull, os.O_RDONLY if fd else os.O_WRONLY)


process = Process()
