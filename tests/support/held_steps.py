"""A constraint that holds the step of its request, and so the whole engine, until it is let go."""

from __future__ import annotations

import threading
from collections.abc import Sequence


class HeldStep:
    """``begun``: whether its step runs. It allows every token of ``vocab``, once ``go_on`` is set."""

    def __init__(self, vocab: int = 256) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._mask = b"\xff" * ((vocab + 7) // 8)

    def allowed(self, output: Sequence[int]) -> bytes:
        self.begun.set()
        assert self.go_on.wait(60)
        return self._mask
