"""Prompts of simulated requests: as long as they should be, and alike where a trace says that they are."""

from __future__ import annotations

from aioengine.lab.workload.requests import PREFIX_BLOCK, Arrival
from aioengine.request import SamplingParams

EMPTY = 0
"""The token that says nothing."""


class SimulatedRequests:
    """Prompts without content are cut from one list; those with content share what their ``prefix`` shares.
    The engine knows the outputs' lengths.

    Args:
        vocab_size: Tokens are below it, and the last one is never in a prompt.
    """

    def __init__(self, vocab_size: int) -> None:
        self._base = vocab_size - 2
        self._tokens: list[int] = []
        self._params: dict[int, SamplingParams] = {}

    def prompt(self, _index: int, arrival: Arrival) -> list[int]:
        """``prompt_tokens`` token ids."""
        length = arrival.prompt_tokens
        if len(self._tokens) < length:
            self._tokens = [EMPTY] * length
        tokens = self._tokens[:length]
        for index, block in enumerate(arrival.prefix):
            # A block's number is written into its first tokens, in digits; digit 0 of a block is never 0.
            start = index * PREFIX_BLOCK
            number = block + 1
            for place in range(start, min(start + 4, length)):
                number, digit = divmod(number, self._base)
                tokens[place] = digit + 1
        return tokens

    def params(self, arrival: Arrival) -> SamplingParams:
        """That allow what the arrival does."""
        allowed = arrival.output_tokens if arrival.max_tokens is None else arrival.max_tokens
        known = self._params.get(allowed)
        if known is None:
            known = self._params[allowed] = SamplingParams(max_tokens=allowed)
        return known
