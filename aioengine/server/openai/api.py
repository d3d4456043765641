"""Types that more than one endpoint uses. Their field names are OpenAI's, and vLLM's beyond those."""

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
Ignored = msgspec.Raw
"""Of a field that is accepted and has no effect: its value is passed over, nothing is made of it."""

MAX_NAMED_TOKENS = 1024
"""Entries of ``logit_bias`` and of ``stop_token_ids``. Every step looks at them, so they cost everybody."""


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0
    """Those whose keys and values were in the prefix cache."""


class PromptLogprob(msgspec.Struct, gc=False):
    logprob: float
    rank: int | None
    """1 for the most likely token; null for one that is not among those asked for."""
    decoded_token: str


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    """A last chunk with the usage."""
    continuous_usage_stats: bool | None = None
    """Beside ``include_usage``: every chunk has its choice's usage so far."""
    include_obfuscation: bool | None = None
    """Ignored."""


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    """The schema is enforced, whatever it is. True: undeclared properties are left out even if the server
    allows them."""


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of the first four."""

    json: dict[str, Any] | str | None = None
    """A JSON schema."""
    regex: str | None = None
    choice: Annotated[list[str], Meta(max_length=10_000)] | None = None
    grammar: str | None = None
    """In Lark's notation."""
    disable_any_whitespace: bool | None = None
    """For ``json``: compact, or not. If it is not given, the server decides."""
    disable_additional_properties: bool | None = None
    """For ``json``: only declared properties, or also others. If it is not given, the server decides."""


class GenerationFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the requests of both completion endpoints have in common."""

    model: str
    """The base model's name, or an adapter's."""
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    best_of: int | None = None
    """Only what ``n`` is."""
    max_tokens: Count | None = None
    """0 with ``prompt_logprobs``, or ``echo`` for a completion: the prompt alone is looked at."""
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
    """Token id -> what is added to its logit."""
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
    """Until so many tokens are generated nothing ends the answer."""
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    """Keep so many of the prompt's last tokens; -1: as many as the context has room for."""
    prompt_logprobs: Logprobs | None = None
    """Not with ``stream``: log-probabilities of the prompt's tokens and of this many most likely ones."""
    return_token_ids: bool | None = None
    """Beside the text, the ids of the prompt's and the answer's tokens."""
    request_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._\-]{1,128}$")] | None = None
    """What the answer's id ends with."""
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
