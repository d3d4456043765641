"""``/v1/messages``: a conversation in, the assistant's next message out."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.response import Response

from aioengine.request import CachePin
from aioengine.server.context import Context
from aioengine.server.framework import RESPONSES, Handled, record_of
from aioengine.server.messages.api import CountRequest, MessagesRequest
from aioengine.server.messages.cache_control import breakpoints, find_pins, hour_tokens
from aioengine.server.messages.read import prompt_of, to_chat, with_thinking
from aioengine.server.messages.reply import MessagesReply
from aioengine.server.openai.chat import encode_messages, start_chat
from aioengine.server.openai.tools import plan_tools


class Counted(msgspec.Struct):
    input_tokens: int


def messages_routes(context: Context) -> list[HTTPRouteHandler]:
    @post("/v1/messages", status_code=200, responses=RESPONSES, summary="Answer, as Anthropic's API")
    async def messages(
        data: JSONBody[MessagesRequest], request: Request[Any, Any, Any]
    ) -> Response[dict[str, Any]]:
        record = record_of(request)
        data = with_thinking(data, context.tokenizer.chat_template)
        wanted = breakpoints(data)
        chat = await start_chat(context, to_chat(data), record, prefix="msg_")
        pins: list[CachePin] = []
        if wanted:
            [prompt] = chat.generation.prompts
            pins = await find_pins(context, prompt, wanted, record)
            chat.generation.pin(pins)
        reply = MessagesReply(
            chat.generation.reply_id,
            chat.generation.seed,
            data.model,
            chat.parsers[0],
            data.stop_sequences or (),
            hour_tokens=hour_tokens(pins, context.engine.config.block_size),
        )
        return Handled(context, chat.generation, reply, stream=data.stream, record=record)

    @post("/v1/messages/count_tokens", status_code=200, responses=RESPONSES, summary="Tokens of a prompt")
    async def count_tokens(data: JSONBody[CountRequest], request: Request[Any, Any, Any]) -> Counted:
        record = record_of(request)
        context.wanted(data, record)
        chat = prompt_of(with_thinking(data, context.tokenizer.chat_template))
        plan = plan_tools(chat.tools, chat.tool_choice)
        return Counted(len(await encode_messages(context, chat, plan, record)))

    return [messages, count_tokens]
