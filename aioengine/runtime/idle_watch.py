"""Noticing a policy that leaves requests waiting although nothing is in the way."""

from __future__ import annotations

import logging

from aioengine.core import Core
from aioengine.schedulers.policy import Location

logger = logging.getLogger("aioengine")

IDLE_WARNING_SECONDS = 5.0


class IdleWatch:
    """Says so in the log, once for each such time, and does nothing about it: what is asked for may be
    what the policy is meant to do."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._since: float | None = None
        self._said = False

    def look(self, now: float, *, idle: bool) -> None:
        """``idle``: no batch was formed and no adapter is moving. To be called after every decision."""
        if not idle or not self._core.queues:
            self._since, self._said = None, False
            return
        if self._since is None:
            self._since = now
        seconds = now - self._since
        if self._said or seconds < IDLE_WARNING_SECONDS:
            return
        self._said = True
        heads = self._core.queues.heads.values()
        cold = sum(len(e.waiting) for e in heads if e is not None and e.location is not Location.SLOT)
        waiting = len(self._core.queues)
        logger.warning(
            "policy %s has started nothing for %.0f s: %d requests wait (%d that could run, %d whose "
            "adapters are in no slot), nothing runs and no adapter is moving",
            self._core.policy_name,
            seconds,
            waiting,
            waiting - cold,
            cold,
        )
