"""Requests of the completion endpoints, and the types that others share with them. Field names are OpenAI's;
additional ones are vLLM's. "null" is the same as a field that is not given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.errors import ConfigError
from aioengine.request import SamplingParams
from aioengine.server.errors import unsupported

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Logprobs = Annotated[int, Meta(ge=0, le=20)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Whole = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
Probability = Annotated[float, Meta(gt=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Factor = Annotated[float, Meta(ge=-100, le=100)]
Priority = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
"""For scheduling policies that look at it; higher is more urgent."""
Salt = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
StopString = Annotated[str, Meta(max_length=256)]
StopStrings = Annotated[list[StopString], Meta(max_length=16)]
Choices = Annotated[list[str], Meta(max_length=10_000)]
Name = Annotated[str, Meta(max_length=256)]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._\-]{1,128}$(?!\n)")]
"""End of an answer's id. ("$" alone would also match before a line's end.)"""
FunctionText = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$(?!\n)")]
"""A function's name."""
Prompts = str | list[str | int | list[int]]
"""A text, several texts, token ids, or several lists of token ids."""
Schema = dict[str, Any]
"""A JSON schema."""
FinishReason = Literal["stop", "length", "tool_calls", "abort"]
Ignored = msgspec.Raw
"""Type of a field that is accepted and has no effect: its value is skipped, not decoded."""
IGNORED: Any = msgspec.field(default_factory=msgspec.Raw)

MAX_NAMED_TOKENS = 1024
"""Entries of ``logit_bias`` and of ``stop_token_ids``. Every step processes them, so they cost all
requests."""
MAX_MESSAGES = 2048
MAX_PARTS = 2048
"""Parts of one message."""
MAX_TOOLS = 128
"""Tools, and calls in one message. These three are OpenAI's bounds; a template's work grows with each."""


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a request whose unknown fields are refused."""


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0
    """Tokens whose keys and values were in the prefix cache."""


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached),
        )


class StreamOptions(Strict, kw_only=True):
    include_usage: bool | None = None
    """Whether a last chunk reports the usage."""
    continuous_usage_stats: bool | None = None
    """With ``include_usage``: every chunk reports its choice's usage so far."""
    include_obfuscation: bool | None = None
    """Ignored."""


class JsonSchemaFormat(Strict, kw_only=True):
    name: Name
    schema: Schema | None = None
    description: str | None = None
    strict: bool | None = None
    """The schema is enforced either way. True excludes undeclared properties even if the server allows
    them."""


class ResponseFormat(Strict, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Strict, kw_only=True):
    """A format of the answer: exactly one of the first four fields."""

    json: Schema | str | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """Grammar in Lark's notation."""


class ModelFields(Strict, kw_only=True):
    """Fields with which every endpoint names the model."""

    model: str
    """The base model's name, or an adapter's; "sql@3" is a version of the adapter "sql"."""
    adapters: Annotated[dict[Name, Factor], Meta(min_length=1, max_length=8)] | None = None
    """Adapters and their weights, which are added up; ``model`` is then the base model's name."""


class SharedFields(ModelFields, kw_only=True):
    """Fields that requests for texts have in each of the APIs."""

    temperature: Temperature | None = None
    """1 if it is not given; 0 is greedy."""
    top_p: Probability | None = None
    stream: bool | None = None

    # vLLM's
    top_k: Whole | None = None
    """0 and -1 keep all."""
    priority: Priority | None = None
    cache_salt: Salt | None = None
    """The prefix cache is shared only with requests of the same salt, and of the same tenant."""

    # Accepted, and without effect on the answer
    service_tier: Ignored = IGNORED
    user: Ignored = IGNORED
    store: Ignored = IGNORED
    safety_identifier: Ignored = IGNORED
    prompt_cache_key: Ignored = IGNORED
    prompt_cache_options: Ignored = IGNORED
    prompt_cache_retention: Ignored = IGNORED

    def shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SharedFields.__struct_fields__}


class GenerationFields(SharedFields, kw_only=True):
    """Fields that both completion endpoints share."""

    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    """0 with ``prompt_logprobs``, or with ``echo`` for a completion, evaluates only the prompt."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | StopStrings | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Factor], Meta(max_length=MAX_NAMED_TOKENS)] | None = None
    """Token id -> value added to its logit."""
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    metadata: Ignored = IGNORED

    # vLLM's
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_NAMED_TOKENS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    """Minimum number of generated tokens before anything can end the answer."""
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Logprobs | None = None
    """Return log-probabilities of the prompt's tokens and of this many most likely ones. Not with
    ``stream``."""
    return_token_ids: bool | None = None
    """Also return the token ids of the prompt and the answer."""
    request_id: RequestId | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None


_SAME = {*SamplingParams.__struct_fields__} & {*GenerationFields.__struct_fields__}


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of a ``generation_config.json`` that are defaults of requests, as vLLM takes them. None is
    what the API has without such a file. ``do_sample`` is not looked at: a temperature of 0 is greedy."""

    temperature: Temperature | None = None
    top_k: Whole | None = None
    top_p: Probability | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Bound on the output of requests that give none."""

    def bounded(self, max_tokens: int) -> int:
        """Limit the default ``max_tokens`` to ``max_new_tokens``."""
        return max_tokens if self.max_new_tokens is None else min(max_tokens, self.max_new_tokens)


def read_sampling_defaults(model: Path | None) -> SamplingDefaults:
    """Read the defaults from the model's folder, if its has the file. Raises ConfigError if a value is not
    valid."""
    path = None if model is None else model / "generation_config.json"
    if path is None or not path.is_file():
        return SamplingDefaults()
    try:
        return msgspec.json.decode(path.read_bytes(), type=SamplingDefaults)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"generation_config: {path}: {error}; correct it, or set generation_config='none'"
        ) from error


def sampling_params(
    fields: GenerationFields, defaults: SamplingDefaults, **own: int | None
) -> SamplingParams:
    """Return the parameters of the first choice; ``defaults`` stand in for what ``fields`` do not name, and
    ``own`` are those that an endpoint has in a form of its own.

    Raises ApiError or RequestInvalid for fields that are not valid together.
    """
    if fields.prompt_logprobs is not None and fields.stream:
        raise unsupported("prompt_logprobs", "not with stream")
    values: dict[str, Any] = {"temperature": 1.0, **msgspec.to_builtins(defaults)}
    values.pop("max_new_tokens", None)
    values |= {name: value for name in _SAME if (value := getattr(fields, name)) is not None}
    values["top_k"] = max(values.get("top_k", 0), 0)
    return SamplingParams(**values | own)


class CompletionRequest(GenerationFields, kw_only=True):
    prompt: Prompts
    logprobs: Logprobs | bool | None = None
    """Log-probabilities of each token and of this many most likely ones; true is 1, false is null."""
    echo: bool | None = None
    """Whether the prompt precedes the answer, in the text and in the log-probabilities."""
    add_special_tokens: bool | None = None
    """Whether special tokens are added to text prompts; true if not given."""

    @property
    def most_likely(self) -> int | None:
        """``logprobs`` as a number; None if no log-probabilities are wanted."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)


# Chats


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    """Only "text"; in an assistant's turn also "refusal"."""
    text: str | None = None
    refusal: str | None = None


Content = str | Annotated[list[ContentPart], Meta(max_length=MAX_PARTS)]


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str
    """JSON; an empty text in a request means {}."""


class ToolCall(msgspec.Struct, kw_only=True):
    """A call, in messages and answers; a stream has each in one piece."""

    index: int | msgspec.UnsetType = msgspec.UNSET
    """In streams."""
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    @classmethod
    def of(cls, id_: str, name: str, arguments: str) -> ToolCall:
        return cls(id=id_, function=FunctionCall(name=name, arguments=arguments))


class Message(msgspec.Struct, kw_only=True):
    """One turn. Fields beyond these, as in answers that clients send back, are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    refusal: str | None = None
    """The assistant's refusal, instead of content."""
    reasoning_content: str | None = None
    """The assistant's reasoning in an earlier answer, for templates that show it."""
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None


class Function(Strict, kw_only=True, omit_defaults=True):
    name: FunctionText
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict, kw_only=True, tag_field="type", tag="function"):
    function: Function

    @classmethod
    def all_of(cls, functions: Sequence[Function] | None) -> list[Tool] | None:
        """Return tools of functions as other APIs write them; None for none."""
        plain = [msgspec.convert(each, Function, from_attributes=True) for each in functions or ()]
        return [cls(function=function) for function in plain] or None


class FunctionName(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(Strict, kw_only=True, tag_field="type", tag="function"):
    function: FunctionName


class Allowed(Strict, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict, kw_only=True, tag_field="type", tag="allowed_tools"):
    """Restricts the tools by name; the model sees no others."""

    allowed_tools: Allowed


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class ChatRequest(GenerationFields, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    """Takes precedence over ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """False: at most one call. True: up to 16 calls where a call is required (by default one)."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as ``enable_thinking``."""
    add_generation_prompt: bool | None = None
    """Whether the opening of the assistant's next turn follows the messages; true if it is not given."""
    continue_final_message: bool | None = None
    """Whether the answer continues the last message instead of opening a new turn."""
    verbosity: Ignored = IGNORED
    reasoning_effort: str | None = None
    """The variable ``reasoning_effort`` of chat templates that have it; otherwise only "none"."""

    modalities: list[Literal["text"]] | None = None
