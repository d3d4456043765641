"""Sampling parameters: those of a request, in place of the model's own defaults."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aioengine.errors import ConfigError
from aioengine.request import SamplingParams
from aioengine.server.errors import unsupported
from aioengine.server.openai.api import GenerationFields, Probability, Temperature, Whole

FILE_NAME = "generation_config.json"
_SAME_NAME = (
    *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "stop", "stop_token_ids", "include_stop_str_in_output"),
    *("ignore_eos", "min_tokens", "skip_special_tokens"),
)


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a ``generation_config.json`` that are defaults of requests, as vLLM takes them. None is
    what the API has without such a file. ``do_sample`` is not looked at: a temperature of 0 is greedy."""

    temperature: Temperature | None = None
    top_k: Whole | None = None
    top_p: Probability | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Bound on the output of requests that give none."""

    def given(self) -> dict[str, Any]:
        """Return the defaults that the file contains."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    def bounded(self, max_tokens: int) -> int:
        """Limit the default ``max_tokens`` to ``max_new_tokens``."""
        return max_tokens if self.max_new_tokens is None else min(max_tokens, self.max_new_tokens)


def read_sampling_defaults(model: Path | None) -> SamplingDefaults:
    """Read the defaults from the model's folder, if its has the file. Raises ConfigError if a value is not
    valid."""
    path = None if model is None else model / FILE_NAME
    if path is None or not path.is_file():
        return SamplingDefaults()
    try:
        return msgspec.json.decode(path.read_bytes(), type=SamplingDefaults)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"generation_config: {path}: {error}; correct it, or set generation_config='none'"
        ) from error


def sampling_params(
    fields: GenerationFields,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Return the parameters of the first choice; ``defaults`` stand in for what ``fields`` do not name.

    Raises ApiError or RequestInvalid for fields that are not valid together.
    """
    if fields.prompt_logprobs is not None and fields.stream:
        raise unsupported("prompt_logprobs", "not with stream")
    values: dict[str, Any] = {"temperature": 1.0, **defaults.given()}
    values.pop("max_new_tokens", None)
    values |= {name: value for name in _SAME_NAME if (value := getattr(fields, name)) is not None}
    values["top_k"] = max(values.get("top_k", 0), 0)
    values |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    return SamplingParams(max_tokens=max_tokens, seed=fields.seed, **values)


def drawn_seeds(seed: int | None) -> Iterator[int]:
    """Draw the seeds of requests that have none from ``seed``; None: from a random one. Who knows some of
    them, but not ``seed``, cannot tell others."""
    key = secrets.token_bytes(16) if seed is None else seed.to_bytes(8, "big")
    for number in count():
        digest = blake2b(number.to_bytes(8, "big"), key=key, digest_size=8).digest()
        yield int.from_bytes(digest, "big") >> 1
