"""``/v1/messages``: a conversation in, the assistant's next message out."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.messages.api import CountRequest, MessagesRequest
from aioengine.server.messages.read import prompt_of, to_chat, with_thinking
from aioengine.server.messages.reply import MessagesReply
from aioengine.server.names import wanted_adapter
from aioengine.server.openai.chat import encode_messages, start_chat
from aioengine.server.openai.form import plan_tools


class Counted(msgspec.Struct):
    input_tokens: int


async def messages(call: Call, data: MessagesRequest) -> Annotated[Answer, dict[str, Any]]:
    """Answer, as Anthropic's API."""
    data = with_thinking(data, call.context.tokenizer.chat_template)
    answer, [parser] = await start_chat(call, to_chat(data), prefix="msg_")
    answer.reply = MessagesReply(answer.id, answer.seed, data.model, parser, data.stop_sequences or ())
    return answer


async def count_tokens(call: Call, data: CountRequest) -> Counted:
    """Tokens of a prompt."""
    wanted_adapter(call.context, data, call.record)
    chat = prompt_of(with_thinking(data, call.context.tokenizer.chat_template))
    return Counted(len(await encode_messages(call, chat, plan_tools(chat.tools, chat.tool_choice))))
