"""Prompts and parameters of a workload's requests: for a simulated engine, with the length and the shared
beginnings that the workload gives, and for a live one, random prompts and outputs of a given length."""

from __future__ import annotations

import random

from aioengine.lab.workload.requests import PREFIX_BLOCK, Arrival
from aioengine.model.spec import ModelSpec
from aioengine.request import SamplingParams

EMPTY = 0
"""Token without meaning, which fills prompts."""


class SimulatedRequests:
    """Makes prompts that share the tokens which their ``prefix`` shares, and no others.

    The engine knows how long outputs are.

    Args:
        vocab_size: Tokens are below it, and the last one is never in a prompt.
    """

    def __init__(self, vocab_size: int) -> None:
        self._base = vocab_size - 2
        self._tokens: list[int] = []
        self._params: dict[int, SamplingParams] = {}

    def prompt(self, index: int, arrival: Arrival) -> list[int]:
        """Return ``prompt_tokens`` token ids for the workload's request number ``index``."""
        length = arrival.prompt_tokens
        if len(self._tokens) < length:
            self._tokens = [EMPTY] * length
        tokens = self._tokens[:length]
        for place, block in enumerate(arrival.prefix):
            self._write(tokens, place * PREFIX_BLOCK, block)
        own = len(arrival.prefix) * PREFIX_BLOCK
        self._write(tokens, own, index)
        if own + 4 < length:
            tokens[own + 4] = EMPTY + 1  # so that no request's number equals a block's
        return tokens

    def _write(self, tokens: list[int], start: int, number: int) -> None:
        """Encode a number in four tokens from ``start`` on, none of which is EMPTY."""
        for place in range(start, min(start + 4, len(tokens))):
            number, digit = divmod(number, self._base)
            tokens[place] = digit + 1

    def params(self, arrival: Arrival) -> SamplingParams:
        """Return parameters with the arrival's bound on output tokens."""
        allowed = arrival.output_tokens if arrival.max_tokens is None else arrival.max_tokens
        known = self._params.get(allowed)
        if known is None:
            known = self._params[allowed] = SamplingParams(max_tokens=allowed)
        return known


class LiveRequests:
    """Makes prompts and parameters, which depend only on a request's number ``index`` and on ``seed``. Tokens
    are random, so that no two prompts share a prefix."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self._seed = seed
        self._tokens = [token for token in range(spec.vocab_size) if token not in set(spec.eos_token_ids)]

    def prompt(self, index: int, arrival: Arrival) -> list[int]:
        return random.Random(f"{self._seed} {index}").choices(self._tokens, k=arrival.prompt_tokens)

    def params(self, arrival: Arrival) -> SamplingParams:
        """Return parameters with which the output has ``arrival.output_tokens`` tokens."""
        allowed = arrival.output_tokens if arrival.max_tokens is None else arrival.max_tokens
        return SamplingParams(max_tokens=min(allowed, arrival.output_tokens), ignore_eos=True)
