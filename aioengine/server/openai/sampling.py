"""From a request's fields to SamplingParams, one for each choice."""

from __future__ import annotations

from typing import Any

import msgspec

from aioengine.request import SamplingParams, TokenConstraint
from aioengine.server.errors import ApiError
from aioengine.server.openai.api import GenerationFields

_SAME_NAME = (
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
)
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_TOKENS_NAMED = 1024
"""Entries of ``logit_bias`` and of ``stop_token_ids``. Every step looks at them, so they cost everybody."""


def sampling_params(
    fields: GenerationFields, *, max_tokens: int, logprobs: int | None, constraint: TokenConstraint | None
) -> SamplingParams:
    """Of the first choice. Raises ApiError or RequestInvalid for what cannot be."""
    _check_sizes(fields)
    if constraint is not None and fields.ignore_eos:
        raise ApiError(400, "ignore_eos: the end is where the format says", param="ignore_eos")
    values: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(fields, name)) is not None
    }
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=max(fields.top_k or 0, 0),
        seed=fields.seed,
        logprobs=logprobs,
        constraint=constraint,
        **values,
    )


def _check_sizes(fields: GenerationFields) -> None:
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if len(stop) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_LENGTH for text in stop):
        raise ApiError(
            400,
            f"stop: at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters",
            param="stop",
            code="invalid_value",
        )
    for name, entries in (("logit_bias", fields.logit_bias), ("stop_token_ids", fields.stop_token_ids)):
        if entries is not None and len(entries) > MAX_TOKENS_NAMED:
            raise ApiError(
                400, f"{name}: at most {MAX_TOKENS_NAMED} tokens", param=name, code="invalid_value"
            )


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The ``choice``-th of n: the same but for the seed, if there is one."""
    if params.seed is None or choice == 0:
        return params
    # An odd multiplier: distinct seeds for distinct choices, and none near the seeds that people pick.
    seed = (params.seed + choice * 0x9E3779B97F4A7C15) % 2**64
    return msgspec.structs.replace(params, seed=seed)
