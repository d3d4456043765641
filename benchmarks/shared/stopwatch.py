"""A clock for functions of the package."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Sum of the times that a function of the package takes, from now on."""

    def __init__(self, owner: Any, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += clock() - start

        setattr(owner, name, timed)
