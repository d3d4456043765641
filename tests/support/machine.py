"""How fast this machine is, for bounds on processor time."""

from __future__ import annotations

import functools
import json
import time

USUAL = 0.2
"""Seconds of processor time that the work below takes where the tests' bounds were set."""


@functools.cache
def slowness() -> float:
    """How many times longer Python takes here than there; 1 if it is not slower."""
    began = time.thread_time()
    found = {}
    for i in range(60_000):
        found[i % 97] = json.dumps([i, str(i)])
    return max(1.0, (time.thread_time() - began) / USUAL)
