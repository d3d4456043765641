"""Replays a request whose first tokens another engine has generated and delivered.

Normally these tokens are computed in one piece, like a preempted request's. A replay decodes them again, one
in each step. A constraint leaves the sampler no other choice, so everything else (draws, penalties, shapes of
the steps) is the same as the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from aioengine.request import StartedConstraint, TokenConstraint


class Replayed:
    """Constraint that allows only ``output``, token by token, and afterwards the same as ``inner``."""

    def __init__(self, output: Sequence[int], inner: TokenConstraint | None, *, vocab: int) -> None:
        self._output = output
        self._inner = inner
        self._started = cast(StartedConstraint, inner) if hasattr(inner, "begin") else None
        self._all = b"\xff" * -(-vocab // 8)
        self.forced: Sequence[int] = ()
        """Those of ``inner`` if the last ``poll`` asked it. (Proposed tokens may reach beyond ``output`` in a
        step that begins within it, and the next one is within it again.)"""

    @property
    def slow(self) -> bool:
        return self._started is not None and self._started.slow

    def begin(self, output: Sequence[int]) -> None:
        if self._started is not None and len(output) >= len(self._output):
            self._started.begin(output)

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        self.forced = ()
        if len(output) < len(self._output) or self._started is None:
            return self.allowed(output)
        mask = self._started.poll(output, seconds)
        self.forced = getattr(self._started, "forced", ())
        return mask

    def allowed(self, output: Sequence[int]) -> bytes:
        if len(output) < len(self._output):
            token = self._output[len(output)]
            mask = bytearray(len(self._all))
            mask[token // 8] = 1 << token % 8
            return bytes(mask)
        return self._all if self._inner is None else self._inner.allowed(output)
