"""Measures the time of a replica for a prompt token, on its normal steps."""

from __future__ import annotations

from math import exp

TOKENS_REMEMBERED = 16384
"""A token that was measured this many tokens ago counts 1/e as much as a new one."""
TOKENS_NEEDED = 256
"""Fewer tokens are not used, because the first steps are slow for other reasons. A router that used them
would send no more requests, and so could not learn the true speed."""


class TokenSpeed:
    """Mean seconds for a token, over tokens and not over steps, because a short step is mostly overhead."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        """Count a step of ``tokens`` tokens that took ``seconds``."""
        kept = exp(-tokens / TOKENS_REMEMBERED)
        self._seconds = kept * self._seconds + seconds
        self._tokens = kept * self._tokens + tokens

    @property
    def seconds_per_token(self) -> float | None:
        """None until enough has been measured."""
        return self._seconds / self._tokens if self._tokens >= TOKENS_NEEDED else None
