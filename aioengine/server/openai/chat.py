"""``/v1/chat/completions``: messages in, the assistant's next one out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from aioengine.server.answer import Answer
from aioengine.server.context import Call, Context
from aioengine.server.errors import invalid, needed, unsupported
from aioengine.server.formats.calls import THINK
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai.api import ChatRequest, ContentPart, Function, Message, Tool
from aioengine.server.openai.form import ToolPlan, plan_tools, wanted_form
from aioengine.server.openai.replies import ChatCompletion, ChatReply
from aioengine.server.openai.sampling import sampling_params
from aioengine.server.prompts import check_prompts, encode_chat
from aioengine.server.transport.body import check_counts

_OWN_VARIABLES = ("messages", "tools", "continue_final_message")


async def chat_completions(call: Call, data: ChatRequest) -> Annotated[Answer, ChatCompletion]:
    """Continue a conversation."""
    answer, parsers = await start_chat(call, data, prefix="chatcmpl-")
    answer.reply = ChatReply(answer.id, answer.seed, data, call.context.token_bytes(), parsers)
    return answer


class Chat(NamedTuple):
    """The assistant's next turn before it is generated."""

    answer: Answer
    parsers: list[AnswerParser | None]
    """A parser for each choice; None where the answer is text alone."""


async def start_chat(call: Call, data: ChatRequest, *, prefix: str) -> Chat:
    """Make the answer to a chat, for any of the APIs; it still needs its reply. Its id begins with
    ``prefix``.

    Raises ApiError and RequestInvalid for requests that cannot be served.
    """
    context = call.context
    _check(data, context)
    tools = plan_tools(data.tools, data.tool_choice, data.parallel_tool_calls)
    formats = context.formats
    form = wanted_form(data, context.settings.schemas, tools, formats)
    asked = data.max_tokens if data.max_completion_tokens is None else data.max_completion_tokens
    prompt = await encode_messages(call, data, tools)
    check_prompts(context, [prompt], data.n or 1, max_tokens=asked, field="messages")
    defaults = await context.defaults()
    room = context.settings.default_max_tokens or context.max_model_len - len(prompt)
    params = sampling_params(
        data,
        defaults,
        max_tokens=defaults.bounded(room) if asked is None else asked,
        logprobs=(data.top_logprobs or 0) if data.logprobs else None,
        prompt_logprobs=data.prompt_logprobs,
    )
    answer = Answer(call, data, [prompt], tools.sampling(params, formats), form, prefix=prefix)
    is_thinking = False
    if form is None and formats.reasoning == "think":
        is_thinking = context.tokenizer.decode(prompt[-16:], False).rstrip().endswith(THINK)
    return Chat(answer, [tools.parser(formats, is_thinking=is_thinking) for _ in range(len(answer))])


async def encode_messages(call: Call, data: ChatRequest, tools: ToolPlan) -> list[int]:
    """Tokenize the chat's prompt."""
    return await encode_chat(call, to_template(data.messages), _variables(data, tools))


def to_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Convert messages to the form of chat templates: content as one text, arguments of calls as objects.

    Raises ApiError for content that is not text, and for arguments that are not JSON or hold too many values
    in all.
    """
    arguments = [call.function.arguments for message in messages for call in message.tool_calls or ()]
    check_counts(",".join(arguments).encode(), "messages")
    return [_to_template(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _to_template(message: Message, where: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": _text(message, where)}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = calls = [msgspec.to_builtins(call) for call in message.tool_calls]
        for i, call in enumerate(calls):
            text = call["function"]["arguments"]
            call.pop("index", None)
            try:  # some clients send an empty text for a function without parameters
                call["function"]["arguments"] = msgspec.json.decode(text) if text.strip() else {}
            except msgspec.DecodeError as error:
                raise invalid(
                    f"{where}.tool_calls[{i}].function.arguments", f"is not JSON: {error}"
                ) from error
    return found


def _text(message: Message, where: str) -> str:
    is_own, where = message.role == "assistant", f"{where}.content"
    if message.content is None and is_own:
        return message.refusal or ""
    return text_of(message.content, where, ("text", "refusal") if is_own else ("text",), param=where)


def text_of(
    content: str | Sequence[ContentPart] | None,
    where: str,
    kinds: Collection[str] = ("text",),
    *,
    param: str | None = None,
) -> str:
    """Join the texts of a content by line breaks. Raises ApiError, for programs with ``param``, if it is
    missing, or has parts of other kinds."""
    if content is None:
        raise invalid(where, "is missing")
    if isinstance(content, str):
        return content
    texts = (text_of_part(part, f"{where}[{i}]", kinds, param=param) for i, part in enumerate(content))
    return "\n".join(texts)


def text_of_part(
    part: ContentPart, where: str, kinds: Collection[str] = ("text",), *, param: str | None = None
) -> str:
    if part.type not in kinds:
        why = f"{part.type[:100]!r} is not supported here: only texts are"
        raise invalid(f"{where}.type", why, "unsupported_parameter", param=param)
    return needed(part.refusal if part.type == "refusal" else part.text, f"{where}.text")


def _variables(data: ChatRequest, plan: ToolPlan) -> dict[str, Any]:
    variables = dict(data.chat_template_kwargs or {})
    for name in _OWN_VARIABLES:
        if name in variables:
            raise invalid("chat_template_kwargs", f"{name} is a field of the request; set that", param=name)
    if plan.tools:
        variables["tools"] = tools_to_template(plan.tools)
    if data.reasoning_effort not in (None, "none"):
        variables.setdefault("reasoning_effort", data.reasoning_effort)
    if data.continue_final_message:
        if data.add_generation_prompt:
            raise invalid("add_generation_prompt", "cannot be true with continue_final_message")
        variables["continue_final_message"] = True
    elif data.add_generation_prompt is not None:
        variables["add_generation_prompt"] = data.add_generation_prompt
    return variables


def tools_to_template(tools: list[Tool]) -> list[dict[str, Any]]:
    """Convert tools to the form of chat templates, without absent fields."""

    def given(function: Function) -> dict[str, Any]:
        fields = ((name, getattr(function, name)) for name in Function.__struct_fields__)
        return {name: value for name, value in fields if value is not None}

    return [{"type": "function", "function": given(tool.function)} for tool in tools]


def _check(data: ChatRequest, context: Context) -> None:
    if data.reasoning_effort not in (None, "none"):
        if not isinstance(data.reasoning_effort, str):
            raise invalid("reasoning_effort", "must be a text")
        if "reasoning_effort" not in (context.tokenizer.chat_template or ""):
            why = "the chat template has no such variable; set those that it has in chat_template_kwargs"
            raise unsupported("reasoning_effort", why)
    if data.top_logprobs and not data.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
