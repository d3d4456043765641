"""``/v1/responses``: a conversation in, the assistant's next messages and calls out."""

from __future__ import annotations

from typing import Annotated, Any

from aioengine.server.answer import Answer
from aioengine.server.call import Call
from aioengine.server.openai.chat import start_chat
from aioengine.server.responses.api import ResponsesRequest
from aioengine.server.responses.read import to_chat
from aioengine.server.responses.reply import ResponsesReply


async def responses(call: Call, data: ResponsesRequest) -> Annotated[Answer, dict[str, Any]]:
    """Answer, without state."""
    answer, [parser] = await start_chat(call, to_chat(data), prefix="resp_")
    reply = answer.reply = ResponsesReply(answer.id, answer.seed, data, parser)
    answer.kept = reply.kept
    return answer
