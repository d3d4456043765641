"""Reads the keys file, and reads it again when it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aioengine.errors import ConfigError
from aioengine.server.access.keys import KeysFile, read_keys_file

logger = logging.getLogger("aioengine.server")

POLL_SECONDS = 1.0


class KeysWatch:
    """Watches the keys file. Reads ``path`` at once and passes its content to ``use``; raises ConfigError if
    that fails.

    While :meth:`run` runs, each change is passed to ``use`` within about ``POLL_SECONDS``. A broken or
    missing file leaves the keys as they were, and the log says why. ``then`` is called after each check.
    """

    def __init__(
        self, path: str, use: Callable[[KeysFile], None], then: Callable[[], None] = lambda: None
    ) -> None:
        self._path = Path(path)
        self._use = use
        self._then = then
        self._seen: tuple[int, ...] | None = None
        self._complaint = ""
        use(self._read())

    async def run(self) -> None:
        """Check until cancelled, in a separate thread, because files may be slow and shared pools full."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-keys")
        try:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                try:
                    found = await loop.run_in_executor(thread, self._changed)
                except ConfigError as error:
                    self._complain(str(error))
                else:
                    if found is not None:
                        self._use(found)
                        self._complaint = ""
                        logger.info("read %s again: %d keys", self._path, len(found.keys))
                self._then()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            logger.error("the keys stay as they were: %s", text)

    def _changed(self) -> KeysFile | None:
        return None if self._seen is not None and self._signature() == self._seen else self._read()

    def _read(self) -> KeysFile:
        # Before the content: what is written meanwhile makes another signature, and is read next time.
        self._seen = self._signature()
        return read_keys_file(self._path)

    def _signature(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
