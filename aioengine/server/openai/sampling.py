"""Converts a request's fields to SamplingParams, one for each choice."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import count
from typing import Any

from aioengine.request import SamplingParams
from aioengine.server.errors import unsupported
from aioengine.server.openai.api import GenerationFields
from aioengine.server.openai.generation_config import SamplingDefaults

_SAME_NAME = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
)


def sampling_params(
    fields: GenerationFields,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Return the parameters of the first choice; ``defaults`` stand in for what ``fields`` do not name.

    Raises ApiError or RequestInvalid for fields that are not valid together.
    """
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise unsupported("best_of", "must be n: every choice is sent back")
    if fields.prompt_logprobs is not None and fields.stream:
        raise unsupported("prompt_logprobs", "not with stream")
    values: dict[str, Any] = {"temperature": 1.0, **defaults.given()}
    values.pop("max_new_tokens", None)
    values |= {name: value for name in _SAME_NAME if (value := getattr(fields, name)) is not None}
    values["top_k"] = max(values.get("top_k", 0), 0)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=fields.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **values,
    )


def drawn_seeds(seed: int | None) -> Iterator[int]:
    """Draw the seeds of requests that have none from ``seed``; None: from a random one. Who knows some of
    them, but not ``seed``, cannot tell others."""
    key = secrets.token_bytes(16) if seed is None else seed.to_bytes(8, "big")
    for number in count():
        digest = blake2b(number.to_bytes(8, "big"), key=key, digest_size=8).digest()
        yield int.from_bytes(digest, "big") >> 1


def last_tokens(prompts: Sequence[list[int]], keep: int) -> list[list[int]]:
    """Return the last ``keep`` tokens of each prompt."""
    return [prompt[-keep:] if keep else [] for prompt in prompts]
