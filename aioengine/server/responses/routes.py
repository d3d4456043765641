"""``/v1/responses``: a conversation in, the assistant's next messages and calls out."""

from __future__ import annotations

from typing import Any

from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.response import Response

from aioengine.server.context import Context
from aioengine.server.framework import RESPONSES, Handled, record_of
from aioengine.server.openai.chat import start_chat
from aioengine.server.responses.api import ResponsesRequest
from aioengine.server.responses.read import to_chat
from aioengine.server.responses.reply import ResponsesReply


def responses_routes(context: Context) -> list[HTTPRouteHandler]:
    @post("/v1/responses", status_code=200, responses=RESPONSES, summary="Answer, without state")
    async def responses(
        data: JSONBody[ResponsesRequest], request: Request[Any, Any, Any]
    ) -> Response[dict[str, Any]]:
        record = record_of(request)
        chat = await start_chat(context, to_chat(data), record, prefix="resp_")
        reply = ResponsesReply(chat.generation.reply_id, chat.generation.seed, data, chat.parsers[0])
        return Handled(context, chat.generation, reply, stream=data.stream, record=record, kept=reply.kept)

    return [responses]
