"""Running a generation and sending its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from aioengine.request import RequestOutput
from aioengine.server.access_log import RequestRecord
from aioengine.server.errors import ApiError, ClientDisconnected, to_api_error
from aioengine.server.generation import Generation, Receive, together, while_connected
from aioengine.server.openai.api import GenerationFields, PromptTokensDetails, StreamOptions, Usage
from aioengine.server.settings import ServerSettings

P = ParamSpec("P")
T = TypeVar("T")
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the stream otherwise
]
_DONE = b"data: [DONE]\n\n"


FORMED_IN_THREAD = 256
"""Log-probabilities of prompts; more of them at once are put into JSON in a thread."""


class ReplyOptions(NamedTuple):
    """What a request wants to be told beside the text, without the request, which may be large."""

    model: str
    include_usage: bool
    continuous_usage: bool
    token_ids: bool
    prompt_logprobs: int | None

    @classmethod
    def of(cls, fields: GenerationFields) -> ReplyOptions:
        wanted = fields.stream_options or StreamOptions()
        usage = bool(wanted.include_usage)
        continuous = usage and bool(wanted.continuous_usage_stats)
        return cls(fields.model, usage, continuous, bool(fields.return_token_ids), fields.prompt_logprobs)

    def usage_so_far(self, output: RequestOutput) -> Usage | None:
        """A choice's, if it is wanted with each chunk."""
        if not self.continuous_usage:
            return None
        prompt, answer = len(output.prompt_token_ids), len(output.token_ids)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=answer,
            total_tokens=prompt + answer,
            prompt_tokens_details=PromptTokensDetails(output.cached_tokens),
        )


class Reply(Protocol):
    """Puts a generation's outputs into an endpoint's format, as JSON."""

    def chunk(self, index: int, output: RequestOutput) -> bytes | None:
        """A choice's next part; None if there is nothing to tell. Called in order for each choice."""

    def usage_chunk(self, usage: Usage) -> bytes | None:
        """The part after the last one; None if nobody asked for it."""

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        """The answer in one piece."""


class GenerationResponse:
    """An ASGI application that answers one request.

    The status is decided by the first output: until then every error is an error response, afterwards
    it is the stream's last event. A client that is slow gets fewer and larger parts, because the engine
    gathers what has not been read; one that takes nothing for ``send_timeout`` is let go.
    """

    def __init__(
        self,
        generation: Generation,
        reply: Reply,
        *,
        stream: bool,
        settings: ServerSettings,
        record: RequestRecord,
    ) -> None:
        self._generation = generation
        self._reply = reply
        self._is_stream = stream
        self._settings = settings
        self._record = record
        self._started = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            with self._generation.claimed():
                await while_connected(receive, self._answer(send))
        except Exception as error:
            api_error = to_api_error(error, self._settings.retry_after)
            self._record.refused(api_error.detail)
            self._record.status = api_error.status
            if not self._started:
                await send_response(send, api_error.status, api_error.headers, api_error.body)
            elif not isinstance(error, ClientDisconnected):
                with contextlib.suppress(ClientDisconnected):
                    await self._send(send, b"data: " + api_error.body + b"\n\n" + _DONE, last=True)

    async def _answer(self, send: Send) -> None:
        await self._generation.prepare()
        await (self._stream(send) if self._is_stream else self._whole(send))

    async def _whole(self, send: Send) -> None:
        outputs = await self._generation.last_outputs()
        body = await self._formed(self._reply.whole, outputs, self._generation.usage)
        self._started = True
        await send_response(send, 200, [(b"content-type", b"application/json")], body)

    async def _stream(self, send: Send) -> None:
        writing = asyncio.Lock()  # one choice at a time; what the others have meanwhile gathers

        async def choice(index: int) -> None:
            begun = False
            async with contextlib.aclosing(self._generation.outputs(index)) as outputs:
                async for output in outputs:
                    if begun:
                        chunk = self._reply.chunk(index, output)
                    else:  # the prompt's log-probabilities come with the first
                        chunk, begun = await self._formed(self._reply.chunk, index, output), True
                    if chunk is not None:
                        async with writing:
                            await self._send(send, b"data: " + chunk + b"\n\n")

        await together([choice(index) for index in range(len(self._generation))])
        usage = self._reply.usage_chunk(self._generation.usage)
        end = _DONE if usage is None else b"data: " + usage + b"\n\n" + _DONE
        await self._send(send, end, last=True)

    async def _formed(self, form: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._generation.scored <= FORMED_IN_THREAD:
            return form(*args, **kwargs)
        return await asyncio.to_thread(form, *args, **kwargs)

    async def _send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        try:
            async with asyncio.timeout(self._settings.send_timeout):
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
                await send({"type": "http.response.body", "body": body, "more_body": not last})
        except TimeoutError:
            raise ClientDisconnected from None
        except OSError as error:  # it went away in the middle of a message
            raise ClientDisconnected from error


async def send_response(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError) -> None:
    await send_response(send, error.status, error.headers, error.body)
