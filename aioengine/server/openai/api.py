"""Types that several endpoints share. Field names are OpenAI's; additional ones are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Logprobs = Annotated[int, Meta(ge=0, le=20)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
StopString = Annotated[str, Meta(max_length=256)]
Name = Annotated[str, Meta(max_length=256)]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._\-]{1,128}$(?!\n)")]
"""End of an answer's id. ("$" alone would also match before a line's end.)"""
Ignored = msgspec.Raw
"""Type of a field that is accepted and has no effect: its value is skipped, not decoded."""

MAX_NAMED_TOKENS = 1024
"""Maximum entries of ``logit_bias`` and of ``stop_token_ids``. Every step processes them, so they cost all
requests."""


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0
    """Tokens whose keys and values were in the prefix cache."""


class PromptLogprob(msgspec.Struct, gc=False):
    logprob: float
    rank: int | None
    """1 for the most likely token; null for one that is not among those asked for."""
    decoded_token: str


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    """Whether a last chunk reports the usage."""
    continuous_usage_stats: bool | None = None
    """With ``include_usage``: every chunk reports its choice's usage so far."""
    include_obfuscation: bool | None = None
    """Ignored."""


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    """The schema is enforced either way. True excludes undeclared properties even if the server allows
    them."""


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A format of the answer: exactly one of the first four fields."""

    json: dict[str, Any] | str | None = None
    """A JSON schema."""
    regex: str | None = None
    choice: Annotated[list[str], Meta(max_length=10_000)] | None = None
    grammar: str | None = None
    """Grammar in Lark's notation."""
    disable_any_whitespace: bool | None = None
    """For ``json``: whether the output is compact. The server's default if not given."""
    disable_additional_properties: bool | None = None
    """For ``json``: whether only declared properties are allowed. The server's default if not given."""


class ModelFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields with which every endpoint names the model."""

    model: str
    """The base model's name, or an adapter's; "sql@3" is a version of the adapter "sql"."""
    adapters: Annotated[dict[Name, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=8)] | None = None
    """Adapters and their weights, which are added up; ``model`` is then the base model's name."""


class GenerationFields(ModelFields, kw_only=True, forbid_unknown_fields=True):
    """Fields that both completion endpoints share."""

    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    best_of: int | None = None
    """Must equal ``n``."""
    max_tokens: Count | None = None
    """0 with ``prompt_logprobs``, or with ``echo`` for a completion, evaluates only the prompt."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """1 if it is not given; 0 is greedy."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_NAMED_TOKENS)]
        | None
    ) = None
    """Token id -> value added to its logit."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # vLLM's
    top_k: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_NAMED_TOKENS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    """Minimum number of generated tokens before anything can end the answer."""
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    """Keep only this many last tokens of the prompt; -1 keeps as many as the context has room for."""
    prompt_logprobs: Logprobs | None = None
    """Return log-probabilities of the prompt's tokens and of this many most likely ones. Not with
    ``stream``."""
    return_token_ids: bool | None = None
    """Also return the token ids of the prompt and the answer."""
    request_id: RequestId | None = None
    """End of the answer's id."""
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    """For scheduling policies that look at it; higher is more urgent."""
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    """The prefix cache is shared only with requests of the same salt, and of the same tenant."""
    structured_outputs: StructuredOutputs | None = None
    # Its fields under their older names
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(max_length=10_000)] | None = None
    guided_grammar: str | None = None

    # Accepted, and without effect on the answer
    user: Ignored = msgspec.field(default_factory=msgspec.Raw)
    metadata: Ignored = msgspec.field(default_factory=msgspec.Raw)
    store: Ignored = msgspec.field(default_factory=msgspec.Raw)
    service_tier: Ignored = msgspec.field(default_factory=msgspec.Raw)
    safety_identifier: Ignored = msgspec.field(default_factory=msgspec.Raw)
    prompt_cache_key: Ignored = msgspec.field(default_factory=msgspec.Raw)
    prompt_cache_options: Ignored = msgspec.field(default_factory=msgspec.Raw)
    prompt_cache_retention: Ignored = msgspec.field(default_factory=msgspec.Raw)
