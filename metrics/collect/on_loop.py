"""Runs a short function on the event loop's thread, from any thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

_CHECK_SECONDS = 0.05
"""Seconds between two checks of a waiting caller whether the loop has ended."""


class OnLoop:
    """Remembers the loop and thread that it was made on.

    State of the loop is used only there: a scrape in another thread asks the loop for a snapshot, and waits
    at most ``timeout`` seconds for it. A loop that has ended is not asked, because its state does not change
    any more.
    """

    def __init__(self, timeout: float = 5.0) -> None:
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._thread = threading.get_ident()
        self._timeout = timeout

    def call(self, function: Callable[[], T]) -> T:
        """Return ``function()``. Raises TimeoutError if the loop is too busy to run it."""
        loop = self._loop
        if loop is None or threading.get_ident() == self._thread or not loop.is_running():
            return function()
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        try:
            loop.call_soon_threadsafe(run)
        except RuntimeError:  # closed since we looked
            return function()
        end = time.monotonic() + self._timeout
        while not wait([future], _CHECK_SECONDS).done:
            if not loop.is_running() and future.cancel():
                return function()
            if time.monotonic() >= end and future.cancel():
                raise TimeoutError(f"the event loop did not answer within {self._timeout:g} s")
        return future.result()
