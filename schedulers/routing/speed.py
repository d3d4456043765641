"""How long a replica takes for a prompt token, measured on the steps that it runs anyway."""

from __future__ import annotations

from math import exp

TOKENS_REMEMBERED = 16384
"""A token that was measured so many tokens ago counts 1/e as much as one that is measured now."""
TOKENS_NEEDED = 256
"""Fewer say nothing: the first steps are slow for reasons of their own, and a router that believed them
would send nothing more, by which it could learn better."""


class TokenSpeed:
    """Mean seconds for a token, over tokens and not over steps: a short step is mostly overhead."""

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
