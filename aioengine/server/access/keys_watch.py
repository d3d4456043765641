"""Reads the keys file, and reads it again when it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aioengine.adapters.read_threads import ReadThreads
from aioengine.errors import ConfigError
from aioengine.server.access.keys import KeysFile, read_keys_file

logger = logging.getLogger("aioengine.server")

POLL_SECONDS = 1.0
SLOW_SECONDS = 10.0
"""A read that takes longer is complained about: meanwhile no key can be revoked."""


class KeysWatch:
    """Watches the keys file. Reads ``path`` at once and passes its content to ``use``; raises ConfigError if
    that fails.

    While :meth:`run` runs, each change is passed to ``use`` within about ``POLL_SECONDS``. A file that is
    broken, missing, or on a disk that hangs leaves the keys as they were, and the log says why. ``then`` is
    called after each check.
    """

    def __init__(
        self, path: str, use: Callable[[KeysFile], None], then: Callable[[], None] = lambda: None
    ) -> None:
        self._path = Path(path)
        self._use, self._then = use, then
        self._seen: tuple[int, ...] | None = None
        self._complaint = ""
        """Why the keys in use are not those of the file; empty if they are."""
        use(self._read())

    @property
    def good(self) -> bool:
        """Whether the keys in use are those of the file."""
        return not self._complaint

    async def run(self) -> None:
        """Check until cancelled, in a thread that can be abandoned, because the file's disk may hang. There
        is one such thread at a time. Whatever fails, the log says it, and the next check tries again."""
        threads = ReadThreads("aioengine-keys")
        while True:
            await asyncio.sleep(POLL_SECONDS)
            before = self._complaint
            try:
                self._take(await self._in_time(threads.start(self._changed)), before)
            except ConfigError as error:
                self._complain(str(error))
            except Exception as error:
                self._seen = None  # read, and used, once more: it may be no fault of the file
                self._complain(f"{self._path}: {error!r}")
            with suppress(Exception):
                self._then()  # keys expire, whatever the file is like

    async def _in_time(self, reading: asyncio.Future[KeysFile | None]) -> KeysFile | None:
        """Return what was read, however long it takes; meanwhile keys expire."""
        waited = 0.0
        while not (await asyncio.wait({reading}, timeout=POLL_SECONDS))[0]:
            waited += POLL_SECONDS
            if waited >= SLOW_SECONDS:
                self._complain(f"reading keys file {self._path} takes longer than {SLOW_SECONDS:g} s")
            with suppress(Exception):
                self._then()
        return reading.result()

    def _take(self, found: KeysFile | None, before: str) -> None:
        """Use what was read: None if the file has not changed. ``before`` was the complaint at the start."""
        if found is not None:
            self._use(found)
            self._then()
            self._complaint = ""
            logger.info("read %s again: %d keys", self._path, len(found.keys))
        elif self._complaint != before:
            self._complaint = before
            logger.info("%s can be read again, and has not changed", self._path)

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            logger.error("the keys stay as they were: %s", text)

    def _changed(self) -> KeysFile | None:
        return None if self._seen is not None and self._signature() == self._seen else self._read()

    def _read(self) -> KeysFile:
        # Before the content: what is written meanwhile makes another signature, and is read next time.
        self._seen = self._signature()
        try:
            return read_keys_file(self._path)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):  # no word on the content: the next check reads it again
                self._seen = None
            raise

    def _signature(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
