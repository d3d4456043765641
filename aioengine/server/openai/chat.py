"""``/v1/chat/completions``: messages in, the assistant's next one out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any

import msgspec

from aioengine.runtime.text_work import SHORT
from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import invalid, needed, unsupported
from aioengine.server.formats.calls import THINK
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai.api import ChatRequest, ContentPart, Message, Tool, sampling_params
from aioengine.server.openai.form import plan_tools, wanted_form
from aioengine.server.openai.replies import ChatCompletion, ChatReply
from aioengine.server.prompts import check_prompts, encoded
from aioengine.server.transport.body import check_counts

_OWN_VARIABLES = ("messages", "tools", "continue_final_message")


async def chat_completions(call: Call, data: ChatRequest) -> Annotated[Answer, ChatCompletion]:
    """Continue a conversation."""
    answer, parsers = await start_chat(call, data, prefix="chatcmpl-")
    answer.reply = ChatReply(answer.head, data, call.context.token_bytes(), parsers)
    return answer


async def start_chat(
    call: Call, data: ChatRequest, *, prefix: str
) -> tuple[Answer, list[AnswerParser | None]]:
    """Make the answer to a chat, for any of the APIs; it still needs its reply. Its id begins with
    ``prefix``. Also returns a parser for each choice; None where the answer is text alone.

    Raises ApiError and RequestInvalid for requests that cannot be served.
    """
    context = call.context
    if data.top_logprobs and not data.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    formats, schemas = context.formats, context.settings.schemas
    has_tools = data.tools or data.tool_choice is not None
    plan = plan_tools(data.tools, data.tool_choice, data.parallel_tool_calls) if has_tools else None
    tools = [] if plan is None else plan.tools
    calls = None if plan is None or plan.is_free else plan.form(schemas, formats)
    has_form = calls or data.response_format or data.structured_outputs
    form = wanted_form(data, schemas, calls) if has_form else None
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
    )
    is_text = not (tools or formats.tools or formats.reasoning)  # with nothing in it to look for
    if not is_text and formats.needs_special_tokens(bool(tools)):  # parsers look for them
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    answer = Answer(call, data, [prompt], params, form, prefix=prefix)
    if is_text:
        return answer, [None] * len(answer)
    is_thinking = False
    if form is None and formats.reasoning == "think":
        is_thinking = context.tokenizer.decode(prompt[-16:], False).rstrip().endswith(THINK)
    names = frozenset(tool.function.name for tool in tools)
    single = plan is not None and (plan.forced is not None or plan.parallel is False)
    how = {"single": single, "is_held": calls is not None, "is_thinking": is_thinking}
    return answer, [formats.parser(names, **how) for _ in range(len(answer))]


async def encode_messages(call: Call, data: ChatRequest, tools: Sequence[Tool]) -> list[int]:
    """Tokenize the chat's prompt, with the ``tools`` that may be called. Raises ApiError for content that is
    not text, and for arguments of calls that are not JSON or hold too many values in all."""
    arguments = [call_.function.arguments for message in data.messages for call_ in message.tool_calls or ()]
    check_counts(",".join(arguments).encode(), "messages")
    messages = [_to_template(message, f"messages[{i}]") for i, message in enumerate(data.messages)]
    variables = _variables(call, data, tools)
    tokenizer, limit = call.context.tokenizer, call.context.max_model_len

    def make() -> list[list[int]]:
        return tokenizer.encode_all([tokenizer.render_chat(messages, **variables)], False, limit=limit)

    # Never on the event loop, because a template may take any time. It may write all of the body, tools and
    # arguments of calls included.
    [ids] = await encoded(call, "messages", SHORT + call.record.body_size, make)
    return ids


def _to_template(message: Message, where: str) -> dict[str, Any]:
    """Convert a message to the form of chat templates: content as one text, arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    content, kinds = message.content, ["text"]
    if role == "assistant":
        content, kinds = content or message.refusal or "", ["text", "refusal"]
    found: dict[str, Any] = {"role": role, "content": text_of(content, f"{where}.content", kinds)}
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


def text_of(
    content: str | Sequence[ContentPart] | None, where: str, kinds: Collection[str] = ("text",)
) -> str:
    """Join the texts of a content by line breaks. Raises ApiError if it is missing, or has parts of other
    ``kinds``."""
    if content is None:
        raise invalid(where, "is missing")
    if isinstance(content, str):
        return content
    return "\n".join(text_of_part(part, f"{where}[{i}]", kinds) for i, part in enumerate(content))


def text_of_part(part: ContentPart, where: str, kinds: Collection[str] = ("text",)) -> str:
    if part.type not in kinds:
        why = f"{part.type[:100]!r} is not supported here: only texts are"
        raise unsupported(f"{where}.type", why)
    return needed(part.refusal if part.type == "refusal" else part.text, f"{where}.text")


def _variables(call: Call, data: ChatRequest, tools: Sequence[Tool]) -> dict[str, Any]:
    variables = dict(data.chat_template_kwargs or {})
    for name in _OWN_VARIABLES:
        if name in variables:
            raise invalid("chat_template_kwargs", f"{name} is a field of the request; set that", param=name)
    if tools:
        variables["tools"] = msgspec.to_builtins(tools)
    if data.reasoning_effort not in (None, "none"):
        if "reasoning_effort" not in (call.context.tokenizer.chat_template or ""):
            why = "the chat template has no such variable; set those that it has in chat_template_kwargs"
            raise unsupported("reasoning_effort", why)
        variables.setdefault("reasoning_effort", data.reasoning_effort)
    if data.continue_final_message:
        if data.add_generation_prompt:
            raise invalid("add_generation_prompt", "cannot be true with continue_final_message")
        variables["continue_final_message"] = True
    elif data.add_generation_prompt is not None:
        variables["add_generation_prompt"] = data.add_generation_prompt
    return variables
