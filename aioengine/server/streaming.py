"""Runs a generation and sends its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from aioengine.metrics.page.plumbing import Receive, Send, departure_of, in_parts, respond, watch_of
from aioengine.request import TokenLogprob
from aioengine.runtime.output import RequestOutput
from aioengine.server.access_log import RequestRecord
from aioengine.server.errors import ApiError, ClientDisconnected
from aioengine.server.generation import Generation
from aioengine.server.openai.api import GenerationFields, PromptTokensDetails, StreamOptions, Usage
from aioengine.server.settings import ServerSettings
from aioengine.server.transport.departures import while_connected
from aioengine.tasks import together

P = ParamSpec("P")
T = TypeVar("T")

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the stream otherwise
]


FORMED_IN_THREAD = 256
"""Number of log-probabilities, or numbers of vectors, above which JSON is encoded in a thread."""


class ReplyOptions(NamedTuple):
    """The request's options for the reply, kept without the request itself, which may be large."""

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
        """Return a choice's usage so far, if each chunk should report it."""
        if not self.continuous_usage:
            return None
        prompt, answer = output.prompt_tokens, output.output_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=answer,
            total_tokens=prompt + answer,
            prompt_tokens_details=PromptTokensDetails(output.cached_tokens),
        )


class Reply(Protocol):
    """Formats a generation's outputs for an endpoint: as JSON, or as server-sent events of JSON."""

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        """Format a choice's next part; None if there is nothing to send. Called in order for each choice."""

    def last_events(self, usage: Usage) -> bytes:
        """Format the end of the stream."""

    def failure(self, error: ApiError) -> bytes:
        """Format the end of a stream that fails."""

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        """Format the answer in one piece."""


DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams of completions."""


def event(data: bytes, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    return b"data: %b\n\n" % data if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class SendLimit:
    """A limit on the time that a client may take to accept one part of an answer, for servers that do not
    watch their clients.

    One timer watches all parts: a timer for each would cost a tenth of what a streamed token costs."""

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._began: float | None = None
        """When the part that is being sent was begun."""
        self.exceeded: asyncio.Future[Any] = self._loop.create_future()
        """Its result is a ClientDisconnected."""
        self._timer = self._loop.call_later(seconds, self._look)

    def begin(self) -> None:
        """Note that a part is being sent, until :meth:`end`."""
        self._began = self._loop.time()

    def end(self) -> None:
        self._began = None

    def close(self) -> None:
        self._timer.cancel()
        self.exceeded.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._began is None else self._began) + self._seconds
        if due > now:
            self._timer = self._loop.call_at(due, self._look)
        else:
            self.exceeded.set_result(ClientDisconnected())


class GenerationResponse:
    """An ASGI application that answers one request.

    The status is decided by the first output: until then every error is an error response, afterwards
    it is the stream's last event. A slow client gets fewer and larger parts, because the engine collects
    unread output. The server disconnects one that does not read; where it does not watch its clients, one
    that does not accept a part of 64 KiB in ``send_timeout`` is given up.
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
        self.prepared: Callable[[], None] = lambda: None
        """Called once the request's constraints are built."""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self._limit = None if watch_of(scope) else SendLimit(self._settings.send_timeout)
        exceeded = None if self._limit is None else self._limit.exceeded
        try:
            with self._generation.claimed():
                work = self._answer(send)
                await while_connected(receive, departure_of(scope), work, self._record.ended, exceeded)
        except Exception as error:
            api_error = self._record.refused_by(error, self._settings)
            self._record.status = api_error.status
            if not self._started:
                await send_error(send, api_error, self._record.path)
            elif not isinstance(error, ClientDisconnected):
                with contextlib.suppress(ClientDisconnected, TimeoutError):
                    async with asyncio.timeout(None if exceeded is None else self._settings.send_timeout):
                        await self._send(send, self._reply.failure(api_error), last=True)
        finally:
            if self._limit is not None:
                self._limit.close()

    async def _answer(self, send: Send) -> None:
        await self._generation.prepare()
        self.prepared()
        await (self._stream(send) if self._is_stream else self._whole(send))

    async def _whole(self, send: Send) -> None:
        outputs = await self._generation.last_outputs()
        numbers = self._generation.numbers(outputs)
        numbers += sum(_numbers(output, output.logprobs) for output in outputs)
        body = await self._formed(numbers, self._reply.whole, outputs, self._generation.usage)
        self._started = True
        await respond(send, 200, [(b"content-type", b"application/json")], body)

    async def _stream(self, send: Send) -> None:
        several = len(self._generation) > 1
        writing = asyncio.Lock()  # one choice at a time; the output of the others is collected meanwhile

        async def choice(index: int) -> None:
            numbers = self._generation.prompt_numbers(index)  # they come with the first
            async with contextlib.aclosing(self._generation.outputs(index)) as outputs:
                async for output in outputs:
                    numbers += _numbers(output, output.logprobs_delta)
                    events = await self._formed(numbers, self._reply.events, index, output)
                    numbers = 0
                    if events is None:
                        continue
                    if several:
                        async with writing:
                            await self._send(send, events)
                    else:
                        await self._send(send, events)

        await together([choice(index) for index in range(len(self._generation))])
        await self._send(send, self._reply.last_events(self._generation.usage), last=True)

    async def _formed(self, numbers: int, form: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if numbers <= FORMED_IN_THREAD:
            return form(*args, **kwargs)
        return await self._generation.beside_the_loop(numbers, lambda: form(*args, **kwargs))

    async def _send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        limit = self._limit
        try:
            messages = in_parts({"type": "http.response.body", "body": body, "more_body": not last})
            if not self._started:
                self._started = True
                start = {"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS}
                messages = itertools.chain([start], messages)
            for message in messages:
                if limit is not None:
                    limit.begin()
                await send(message)
        except OSError as error:  # it went away in the middle of a message
            raise ClientDisconnected from error
        finally:
            if limit is not None:
                limit.end()


def _numbers(output: RequestOutput, logprobs: Sequence[TokenLogprob] | None) -> int:
    """Return how many numbers an output has: those of ``logprobs``, or values of a vector."""
    if logprobs:
        return len(logprobs) * (1 + len(logprobs[-1].top))
    return len(output.pooled or ())


async def send_error(send: Send, error: ApiError, path: str) -> None:
    """Answer a request for ``path`` with an error, in the form that this path's clients know."""
    await respond(send, error.status, error.headers, error.body_for(path))
