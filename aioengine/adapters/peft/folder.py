"""The files of an adapter's folder, read with plain reads and watched for changes while they are read.

Files are not mapped: a training job that truncates a mapped file under its reader kills the process
(SIGBUS). Every error is an :class:`~aioengine.errors.AdapterLoadError` with the adapter's name and path,
which says whether a retry may help.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from aioengine.errors import AdapterInvalid, AdapterLoadError

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"

# The medium or whoever serves it may recover; others may give back what the machine ran short of.
_TRANSIENT_NAMES = (
    *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "EDEADLK", "EPIPE", "ENOTCONN"),
    *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"),
)
_TRANSIENT = frozenset(getattr(errno, name) for name in _TRANSIENT_NAMES if hasattr(errno, name))


class _Version(NamedTuple):
    """What tells one content of a file from another without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Version:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class OpenFile:
    """A file of the folder; ``size`` in bytes, as it was when it was opened."""

    def __init__(self, folder: AdapterFolder, name: str, raw: io.FileIO, size: int) -> None:
        self.name = name
        self.size = size
        self._folder = folder
        self._raw = raw

    def seek(self, offset: int) -> None:
        """What is read next begins at this byte of the file."""
        try:
            self._raw.seek(offset)
        except OSError as error:
            raise self._folder.unreadable(self.name, error) from error

    def read(self, size: int) -> bytearray:
        """Exactly the next ``size`` bytes. Raises AdapterLoadError, also if the file ends before."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return data

    def read_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes. Raises as :meth:`read`. Releases the GIL."""
        done = 0
        try:
            while done < len(view):
                count = self._raw.readinto(view[done:])
                if not count:
                    self._folder.failed(
                        f"{self.name} shrank while it was read; is something still writing it?",
                        transient=True,
                    )
                done += count
        except OSError as error:
            raise self._folder.unreadable(self.name, error) from error


class AdapterFolder:
    """The folder ``path`` of the adapter ``name``, for one attempt to read it."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self._versions: dict[str, _Version] = {}

    def check(self) -> None:
        """Raises AdapterLoadError unless the path is a folder."""
        try:
            mode = os.stat(self.path).st_mode
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise self.unreadable("the folder", error) from error
        if not stat.S_ISDIR(mode):
            self.failed("is a file; expected the PEFT folder that contains it")

    @property
    def version(self) -> str:
        """What tells the content of the files that were opened from another, without reading it."""
        return repr(sorted((file, *version) for file, version in self._versions.items()))

    def weights_file(self) -> str:
        """The name of the file with the weights, be it there or not."""
        if os.path.lexists(self._join(BIN_FILE)) and not os.path.lexists(self._join(SAFETENSORS_FILE)):
            return BIN_FILE
        return SAFETENSORS_FILE

    @contextmanager
    def open(self, file: str) -> Iterator[OpenFile]:
        """Open ``file`` and note its version. Raises AdapterLoadError."""
        try:
            if not stat.S_ISREG(os.stat(self._join(file)).st_mode):  # opening a pipe would block for ever
                self.failed(f"{file} is not a regular file")
            raw = io.FileIO(self._join(file))
        except OSError as error:
            raise self.unreadable(file, error) from error
        with raw:
            try:
                status = os.fstat(raw.fileno())
            except OSError as error:
                raise self.unreadable(file, error) from error
            self._versions[file] = _Version.of(status)
            yield OpenFile(self, file, raw, status.st_size)

    def check_unchanged(self) -> None:
        """Raises AdapterLoadError if a file that was read is not the same any more.

        Called at the end, it says that what was read of all files existed at one time: a configuration is
        not paired with another version's weights. (A change within the clock tick of the file system that
        keeps the size goes unnoticed.)
        """
        for file, version in self._versions.items():
            try:
                now = _Version.of(os.stat(self._join(file)))
            except FileNotFoundError:
                now = None
            except OSError as error:
                raise self.unreadable(file, error) from error
            if now != version:
                self.failed(
                    f"{file} changed while it was read; write adapters to a new folder and rename it",
                    transient=True,
                )

    def unreadable(self, what: str, error: OSError | ValueError) -> AdapterLoadError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        transient = isinstance(error, OSError) and error.errno in _TRANSIENT
        return AdapterLoadError(
            f"cannot read {what}: {reason}", name=self.name, path=self.path, transient=transient
        )

    def failed(self, reason: str, *, transient: bool = False) -> NoReturn:
        raise AdapterLoadError(reason, name=self.name, path=self.path, transient=transient)

    def invalid(self, reason: str) -> NoReturn:
        raise AdapterInvalid(reason, name=self.name, path=self.path)

    def _join(self, file: str) -> str:
        return os.path.join(self.path, file)
