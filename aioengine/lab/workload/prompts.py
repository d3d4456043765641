"""Prompts of simulated requests: as long as they should be, and alike where a trace says that they are."""

from __future__ import annotations

from aioengine.lab.workload.requests import PREFIX_BLOCK, Arrival
from aioengine.request import SamplingParams

EMPTY = 0
"""The token that says nothing."""


class SimulatedRequests:
    """Prompts that share what their ``prefix`` shares, and nothing else.

    The engine knows how long outputs are.

    Args:
        vocab_size: Tokens are below it, and the last one is never in a prompt.
    """

    def __init__(self, vocab_size: int) -> None:
        self._base = vocab_size - 2
        self._tokens: list[int] = []
        self._params: dict[int, SamplingParams] = {}

    def prompt(self, index: int, arrival: Arrival) -> list[int]:
        """``prompt_tokens`` token ids, for the workload's request number ``index``."""
        length = arrival.prompt_tokens
        if len(self._tokens) < length:
            self._tokens = [EMPTY] * length
        tokens = self._tokens[:length]
        for place, block in enumerate(arrival.prefix):
            self._write(tokens, place * PREFIX_BLOCK, block)
        own = len(arrival.prefix) * PREFIX_BLOCK
        self._write(tokens, own, index)
        if own + 4 < length:
            tokens[own + 4] = EMPTY + 1  # so that a request's number is no block's
        return tokens

    def _write(self, tokens: list[int], start: int, number: int) -> None:
        """A number from ``start`` on, in four digits that are no EMPTY."""
        for place in range(start, min(start + 4, len(tokens))):
            number, digit = divmod(number, self._base)
            tokens[place] = digit + 1

    def params(self, arrival: Arrival) -> SamplingParams:
        """Return parameters that allow what the arrival does."""
        allowed = arrival.output_tokens if arrival.max_tokens is None else arrival.max_tokens
        known = self._params.get(allowed)
        if known is None:
            known = self._params[allowed] = SamplingParams(max_tokens=allowed)
        return known
