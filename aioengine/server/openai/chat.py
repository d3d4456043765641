"""``/v1/chat/completions``: messages in, the assistant's next one out."""

from __future__ import annotations

from sys import getsizeof
from typing import Any, NamedTuple

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.response import Response

from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, unsupported
from aioengine.server.formats.source import AnswerParser
from aioengine.server.formats.think import OPEN as THINK
from aioengine.server.framework import RESPONSES, Handled, record_of
from aioengine.server.generation import Generation
from aioengine.server.openai.chat_api import ChatCompletion, ChatRequest, Message, Tool
from aioengine.server.openai.chat_reply import ChatReply
from aioengine.server.openai.constraints import wanted_form
from aioengine.server.openai.sampling import last_tokens, sampling_params
from aioengine.server.openai.tools import ToolPlan, plan_tools
from aioengine.server.streaming import ReplyOptions
from aioengine.server.transport.bounded_json import check_counts

_OWN_VARIABLES = ("messages", "tools", "continue_final_message")


def chat_routes(context: Context) -> list[HTTPRouteHandler]:
    @post("/v1/chat/completions", status_code=200, responses=RESPONSES, summary="Continue a conversation")
    async def chat_completions(
        data: JSONBody[ChatRequest], request: Request[Any, Any, Any]
    ) -> Response[ChatCompletion]:
        record = record_of(request)
        chat = await start_chat(context, data, record, prefix="chatcmpl-")
        echoed = _echoed(data.messages[-1]) if data.echo else ""
        reply = ChatReply(
            chat.generation.reply_id,
            chat.generation.seed,
            ReplyOptions.of(data),
            parsers=chat.parsers,
            token_bytes=context.token_bytes(),
            with_logprobs=bool(data.logprobs),
            echoed=echoed,
        )
        stream, kept = data.stream, getsizeof(echoed)
        return Handled(context, chat.generation, reply, stream=stream, record=record, kept=kept)

    return [chat_completions]


class Chat(NamedTuple):
    """The assistant's next turn while it is generated."""

    generation: Generation
    parsers: list[AnswerParser | None]
    """A parser for each choice; None where the answer is text alone."""


async def start_chat(context: Context, data: ChatRequest, record: RequestRecord, *, prefix: str) -> Chat:
    """Build the generation of a chat's answers, for any of the APIs.

    Its id begins with ``prefix``. Raises ApiError and RequestInvalid for requests that cannot be served.
    """
    _refuse_unsupported(data, context)
    tools = plan_tools(data.tools, data.tool_choice, data.parallel_tool_calls)
    formats = context.formats
    form = wanted_form(data, context.settings.schemas, data.response_format, tools, formats)
    asked = data.max_tokens if data.max_completion_tokens is None else data.max_completion_tokens
    keep = context.kept(data.truncate_prompt_tokens, asked)
    prompt = await encode_messages(context, data, tools, record, keep=keep)
    if keep is not None:
        [prompt] = last_tokens([prompt], keep)
    context.check_prompts([prompt], data.n or 1, max_tokens=asked, field="messages")
    room = context.engine.plan.max_model_len - len(prompt)
    defaults = await context.defaults()
    wanted = asked if asked is not None else context.settings.default_max_tokens or room
    params = sampling_params(
        data,
        defaults,
        max_tokens=wanted if asked is not None else defaults.bounded(wanted),
        logprobs=(data.top_logprobs or 0) if data.logprobs else None,
        prompt_logprobs=data.prompt_logprobs,
    )
    params = tools.sampling(params, formats)
    generation = context.generation(data, [prompt], params, form, record, prefix=prefix)
    is_thinking = form is None and formats.reasoning == "think" and context.ends_with(prompt, THINK)
    return Chat(generation, [tools.parser(formats, is_thinking=is_thinking) for _ in range(len(generation))])


async def encode_messages(
    context: Context, data: ChatRequest, tools: ToolPlan, record: RequestRecord, *, keep: int | None = None
) -> list[int]:
    """Tokenize the chat's prompt, or its end with ``keep`` tokens."""
    if tools.tools:
        await context.note_hidden_tools()
    return await context.encode_chat(
        to_template(data.messages),
        _variables(data, tools),
        record=record,
        keep=keep,
    )


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
    if message.name is not None:
        found["name"] = message.name
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [msgspec.to_builtins(call) for call in message.tool_calls]
        for i, call in enumerate(found["tool_calls"]):
            call["function"]["arguments"] = _arguments(call, f"{where}.tool_calls[{i}].function.arguments")
    return found


def _text(message: Message, where: str) -> str:
    content = message.content
    if content is None:
        if message.role == "assistant":
            return message.refusal or ""
        raise ApiError(400, f"{where}.content: is missing", param=f"{where}.content", code="invalid_value")
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        is_refusal = part.type == "refusal" and message.role == "assistant"
        text = part.refusal if is_refusal else part.text
        if (part.type != "text" and not is_refusal) or text is None:
            raise ApiError(
                400,
                f"{where}.content[{i}]: only parts of type 'text' are supported, not {part.type!r}",
                param=f"{where}.content",
                code="unsupported_parameter",
            )
        texts.append(text)
    return "\n".join(texts)


def _arguments(call: dict[str, Any], where: str) -> Any:
    text = call["function"]["arguments"]
    if not text.strip():  # some clients send this for a function without parameters
        return {}
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ApiError(400, f"{where}: is not JSON: {error}", param=where, code="invalid_value") from error


def _variables(data: ChatRequest, plan: ToolPlan) -> dict[str, Any]:
    variables = dict(data.chat_template_kwargs or {})
    for name in _OWN_VARIABLES:
        if name in variables:
            raise ApiError(
                400, f"chat_template_kwargs: {name} is a field of the request; set that", param=name
            )
    if plan.tools:
        variables["tools"] = tools_to_template(plan.tools)
    if data.reasoning_effort not in (None, "none"):
        variables.setdefault("reasoning_effort", data.reasoning_effort)
    if data.continue_final_message:
        if data.add_generation_prompt:
            raise ApiError(
                400,
                "add_generation_prompt: cannot be true with continue_final_message",
                param="add_generation_prompt",
                code="invalid_value",
            )
        variables["continue_final_message"] = True
    elif data.add_generation_prompt is not None:
        variables["add_generation_prompt"] = data.add_generation_prompt
    return variables


def _echoed(message: Message) -> str:
    """Return the text that precedes an answer with ``echo``."""
    return _text(message, "messages[-1]") if message.role == "assistant" else ""


def tools_to_template(tools: list[Tool]) -> list[dict[str, Any]]:
    """Convert tools to the form of chat templates, without absent fields."""
    return [
        {
            "type": "function",
            "function": {
                key: value
                for key, value in msgspec.structs.asdict(tool.function).items()
                if value is not None
            },
        }
        for tool in tools
    ]


def _refuse_unsupported(data: ChatRequest, context: Context) -> None:
    for field, why in (
        ("functions", "use tools"),
        ("function_call", "use tool_choice"),
        ("audio", "answers are text"),
        ("prediction", "is not supported"),
        ("web_search_options", "there is no web search"),
    ):
        if getattr(data, field) is not None:
            raise unsupported(field, why)
    if data.reasoning_effort not in (None, "none"):
        if not isinstance(data.reasoning_effort, str):
            raise ApiError(
                400, "reasoning_effort: must be a text", param="reasoning_effort", code="invalid_value"
            )
        if "reasoning_effort" not in (context.tokenizer.chat_template or ""):
            raise unsupported(
                "reasoning_effort",
                "the model's chat template has no such variable; set those that it has in "
                "chat_template_kwargs",
            )
    if data.modalities not in (None, ["text"]):
        raise unsupported("modalities", "answers are text")
    if data.top_logprobs and not data.logprobs:
        raise ApiError(
            400, "top_logprobs: needs logprobs to be true", param="top_logprobs", code="invalid_value"
        )
