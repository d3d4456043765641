"""The files of an adapter's folder, read with plain reads and watched for changes while they are read.

Files are not mapped: a training job that truncates a mapped file under its reader kills the process
(SIGBUS). An :class:`~aioengine.errors.AdapterLoadError` says whether a retry may help. Who reads an adapter
knows its name, and not each function that finds something wrong: see :func:`naming`.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import NoReturn

from aioengine.adapters.read_threads import Progress
from aioengine.errors import AdapterError, AdapterInvalid, AdapterLoadError, AdapterTooLarge
from aioengine.step import HeldFiles

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"
NO_WEIGHTS = (
    f"there is no {SAFETENSORS_FILE}: save the adapter with PEFT's save_pretrained(..., "
    f"safe_serialization=True). A {BIN_FILE} is not read; convert it with safetensors.torch.save_file("
    f"torch.load({BIN_FILE!r}, weights_only=True), {SAFETENSORS_FILE!r})"
)
MAX_CONFIG_BYTES = 256 << 10
"""A longer configuration is neither fetched nor read."""

# The disk or the server may recover, and other programs may release memory or file descriptors.
_TRANSIENT_NAMES = (
    *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "EDEADLK", "EPIPE", "ENOTCONN"),
    *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"),
)
_TRANSIENT = frozenset(getattr(errno, name) for name in _TRANSIENT_NAMES if hasattr(errno, name))

_PIECE_BYTES = 32 << 20
"""Bytes read in one call: any working disk delivers this much within a second."""
_LOOK_AT = 100


@contextmanager
def naming(name: str, path: str) -> Iterator[None]:
    """Give the adapter's name and path to errors from the block that have none."""
    try:
        yield
    except AdapterError as error:
        if error.name:
            raise
        named = type(error)(error.reason, name=name, path=path, transient=error.transient)
        raise named from error.__cause__


def invalid(reason: str, *, transient: bool = False) -> NoReturn:
    raise AdapterInvalid(reason, name="", transient=transient)


def invalid_config(reason: str) -> NoReturn:
    invalid(f"{CONFIG_FILE}: {reason}")


def invalid_weights(reason: str) -> NoReturn:
    invalid(f"{SAFETENSORS_FILE}: {reason}")


def too_large(reason: str) -> NoReturn:
    """Refuse a rank that no slot has room for."""
    raise AdapterTooLarge(f"{CONFIG_FILE}: {reason}", name="")


def failed(reason: str, *, transient: bool = False) -> NoReturn:
    raise AdapterLoadError(reason, name="", transient=transient)


@contextmanager
def _calling(progress: Progress, what: str) -> Iterator[None]:
    """Call the system for ``what``: its errors become AdapterLoadErrors."""
    try:
        with progress:
            yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        transient = isinstance(error, OSError) and error.errno in _TRANSIENT
        text = f"cannot read {what}: {reason}"
        raise AdapterLoadError(text, name="", transient=transient) from error


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return a version of a file's content, known without reading it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class OpenFile:
    """A file of the folder; ``size`` in bytes, as it was when it was opened."""

    def __init__(self, name: str, raw: io.FileIO, status: os.stat_result, progress: Progress) -> None:
        self.name = name
        self.size = status.st_size
        self._raw = raw
        self._progress = progress

    def read(self, size: int) -> bytes:
        """Read exactly the next ``size`` bytes. Raises AdapterLoadError, also if the file ends early."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes. Raises as :meth:`read`. Releases the GIL."""
        done = 0
        while done < len(view):
            with _calling(self._progress, self.name):
                count = self._raw.readinto(view[done : done + _PIECE_BYTES])
            if not count:
                failed(
                    f"{self.name} shrank while it was read; is a program still writing it?", transient=True
                )
            done += count


class AdapterFolder:
    """The folder ``path``, for one attempt to read it; or ``files`` in memory in its place."""

    def __init__(self, path: str, progress: Progress | None = None, files: HeldFiles | None = None) -> None:
        self._path = path
        self._progress = progress or Progress()
        self._files = files
        self._versions: dict[str, tuple[int, ...]] = {}

    def check(self) -> None:
        """Raise AdapterLoadError unless the path is a folder."""
        if self._files is None:
            with _calling(self._progress, "the folder"):
                mode = os.stat(self._path).st_mode
            if not stat.S_ISDIR(mode):
                failed("is a file; expected the PEFT folder that contains it")

    @property
    def version(self) -> str:
        """Version of the opened files' content, known without reading it."""
        return repr(sorted((file, *version) for file, version in self._versions.items()))

    def has(self, file: str) -> bool:
        """Return whether there is a file of this name, readable or not."""
        if self._files is not None:
            return file in (CONFIG_FILE, SAFETENSORS_FILE)
        with self._progress:
            return os.path.lexists(self._join(file))

    def content(self, file: str, most: int) -> bytes:
        """Return what is in a small file. Raises as :meth:`open`; AdapterInvalid for more than ``most``
        bytes."""
        if self._files is not None and file == CONFIG_FILE:
            return self._files.config
        with self.open(file) as opened:
            if opened.size > most:
                invalid(f"{file}: has {opened.size} bytes, more than {most}")
            return opened.read(opened.size)

    @contextmanager
    def open(self, file: str) -> Iterator[OpenFile]:
        """Open ``file`` and note its version. Raises AdapterLoadError; AdapterInvalid if there is none."""
        try:
            with _calling(self._progress, file):
                raw = io.FileIO(self._join(file), opener=_open_without_waiting)
        except AdapterLoadError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                invalid(why_no_adapter(self._path) if file == CONFIG_FILE else NO_WEIGHTS)
            raise
        with raw:
            with _calling(self._progress, file):
                status = os.fstat(raw.fileno())
            if not stat.S_ISREG(status.st_mode):
                failed(f"{file} is not a regular file")
            self._versions[file] = _stamp(status)
            yield OpenFile(file, raw, status, self._progress)

    def check_unchanged(self) -> None:
        """Raise AdapterLoadError if a file that was read is not the same any more.

        Called at the end, it proves that all parts that were read existed at the same time, so a
        configuration is never paired with the weights of another version. (A change within the clock tick of
        the file system that keeps the size goes unnoticed.)
        """
        for file, version in self._versions.items():
            now = None
            with _calling(self._progress, file), suppress(FileNotFoundError):
                now = _stamp(os.stat(self._join(file)))
            if now != version:
                failed(
                    f"{file} changed while it was read; write adapters to a new folder and rename it",
                    transient=True,
                )

    def _join(self, file: str) -> str:
        return os.path.join(self._path, file) if self._files is None else self._files.weights


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking, even if it is a pipe that nobody writes to. The caller checks what was
    opened, because the path may have been replaced since it was last looked at."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def why_no_adapter(path: str) -> str:
    """Describe what a folder without a configuration seems to be instead. Looks at few of its entries."""
    names: list[str] = []
    with suppress(OSError), os.scandir(path) as entries:
        names = sorted(entry.name for entry in islice(entries, _LOOK_AT))
    inside = [name for name in names if os.path.isfile(os.path.join(path, name, CONFIG_FILE))]
    reason = f"it has no {CONFIG_FILE}"
    if inside:
        return f"{reason}; give its folder {', '.join(inside[:5])}, where PEFT saves named adapters"
    return f"{reason}: save the adapter with save_pretrained, before merge_and_unload"
