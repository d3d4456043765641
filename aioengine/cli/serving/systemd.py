"""Reports to systemd: readiness, the end, and a watchdog that only progress feeds.

The protocol is that of sd_notify(3): datagrams to the socket that ``NOTIFY_SOCKET`` names. Without that
variable nothing is sent.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable


class Systemd:
    """``Type=notify`` of a unit, with ``WatchdogSec=`` or without."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # in the abstract namespace
            self._address = f"\0{self._address[1:]}"
        own = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        timeout = os.environ.get("WATCHDOG_USEC", "") if own else ""
        self.watchdog_seconds = int(timeout) / 1e6 if timeout.isdigit() and int(timeout) else None
        """Seconds after which systemd kills a process that does not report; None: there is no watchdog."""

    def tell(self, *lines: str) -> None:
        """Send assignments such as ``READY=1``. Those that cannot be sent are dropped: systemd has its own
        timeouts."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            pass

    async def feed(self, goes_on: Callable[[], bool]) -> None:
        """Feed the watchdog at intervals while ``goes_on()`` is true, until cancelled.

        This runs on the event loop, so a blocked loop does not feed it either.
        """
        while self.watchdog_seconds is not None:
            if goes_on():
                self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_seconds / 3)
