"""Files whose reading hangs, as on a mount whose server is gone: named pipes that nobody writes to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class Hanging:
    """A reader of the file waits until it is answered."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: int | None = None

    def is_read(self) -> bool:
        """Whether somebody reads it, and will wait from now on."""
        if self._writer is None:
            with contextlib.suppress(OSError):  # nobody has opened it yet
                self._writer = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        return self._writer is not None

    def answer(self, content: bytes) -> None:
        """Give the reader of :meth:`is_read` the content, and its end."""
        assert self._writer is not None
        os.write(self._writer, content)
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None


@contextlib.contextmanager
def hanging(path: Path) -> Iterator[Hanging]:
    """Context in which reading ``path`` hangs, from one moment to the next."""
    pipe = path.with_name(f"{path.name}.pipe")
    os.mkfifo(pipe)
    pipe.replace(path)
    made = Hanging(path)
    try:
        yield made
    finally:
        made.close()
        if path.is_fifo():  # readers get its end, and later ones find no file
            last = os.open(path, os.O_RDWR)
            path.unlink()
            os.close(last)
