"""Answer: the requests to the engine behind one request of the API, and what is sent of their outputs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import msgspec

from aioengine.errors import ConfigError, DeadlineExceeded, RequestInvalid
from aioengine.metrics.page.plumbing import Scope, Send, departure_of, disconnected, respond
from aioengine.request import RequestKeywords, SamplingParams, for_choice
from aioengine.runtime.output import RequestOutput, SoFar
from aioengine.runtime.text_work import SHORT
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, ClientDisconnected, invalid
from aioengine.server.openai.api import GenerationFields, Usage
from aioengine.server.openai.form import Form
from aioengine.server.openai.replies import Reply, StreamReply
from aioengine.server.transport.body import BoundedBody
from aioengine.tasks import end_tasks, together

T = TypeVar("T")

AT_ONCE = 128
"""Requests to the engine of one answer at a time; more wait here, and not in the engine's queue."""
SCORE_BYTES = 64
"""Bytes of an answer for each log-probability in it."""
MAX_SCORES = 2**18
"""Log-probabilities of prompts in one request: prompt tokens x (1 + most likely ones)."""
VALUES_PER_SCORE = 16
"""Numbers of a vector, or token ids, that take as much memory or time as a log-probability."""
FORMED_IN_THREAD = 256
"""Log-probabilities above which JSON is encoded in a thread."""
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the stream otherwise
]


class Answer:
    """``n`` choices for each prompt. Every choice is a request of its own to the engine, which shares the
    prompt's blocks among them.

    The status is decided by the first output: until then every error is an error response, afterwards it is
    the stream's last event. A slow client gets fewer and larger parts, because the engine collects unread
    output. Nothing of a request's body is kept once its constraints are built but what ``kept`` counts: many
    requests may wait, each for minutes.

    Args:
        prompts: Token ids, one list for each prompt.
        params: Those of the first choice; without a seed it gets one.
        form: What the choices must conform to.
        prefix: Beginning of the answer's id.
    """

    reply: Reply
    kept = 0
    """Bytes that the reply keeps of the request's body until its end."""

    def __init__(
        self,
        call: Call,
        fields: GenerationFields,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        form: Form | None = None,
        *,
        prefix: str,
    ) -> None:
        context, record = call.context, call.record
        self.prompts = prompts
        self._engine, self._context, self._record = context.engine, context, record
        self._form = form
        self._is_stream, self._with_ids = bool(fields.stream), bool(fields.return_token_ids)
        seed = next(context.seeds) if params.seed is None else params.seed
        params = msgspec.structs.replace(params, seed=seed)
        choices = range(fields.n or 1)
        self._params = [for_choice(params, choice) for _ in prompts for choice in choices]
        self._prompts = [prompt for prompt in prompts for _ in choices]
        self._id = f"{prefix}{context.new_id()}"
        # The engine's is its own, even where another request has chosen the same id.
        id_ = self._id if fields.request_id is None else f"{prefix}{fields.request_id}"
        self.head: dict[str, Any] = {"id": id_, "created": int(time.time()), "seed": seed}
        """What answers of all APIs begin with, as :class:`~aioengine.server.openai.replies.Head`."""
        self.head["model"] = fields.model
        self._deadline = context.settings.request_timeout
        # Without keys, all clients of one address are one owner; there, requests for several choices count
        # for a separate one, so that a single request does not wait for hundreds of choices.
        is_apart = record.tenant is None and len(self) > 1
        self._tenant = f"{record.owner}, several choices" if is_apart else record.owner
        self._options: RequestKeywords = {
            "adapter": call.wanted_adapter(fields),
            "priority": fields.priority or 0,
            "tenant": self._tenant,
            "cache_salt": context.cache_salt(record.tenant, fields.cache_salt),
        }
        self._so_far: list[SoFar] = [lambda: None] * len(self)
        """Return what there is of each choice so far."""
        self._room = asyncio.Semaphore(self._at_once())
        self._beginning = asyncio.Lock()
        self._held = 0
        """Log-probabilities and vectors that are counted for it."""
        record.completion_id, record.stream = id_, self._is_stream
        record.prompt_tokens = sum(map(len, prompts))
        record.so_far = self._output_tokens
        if record.admission is not None:
            record.admission.charge_prompt(record.prompt_tokens, time.monotonic())

    def __len__(self) -> int:
        return len(self._params)

    def _where(self, adapter: str) -> str:
        """Name an adapter and where it is, for the message of an error."""
        info = self._engine.find_adapter(adapter.partition("@")[0])
        return f" for adapter {adapter!r} ({'not looked up yet' if info is None else info.location})"

    def _at_once(self) -> int:
        """Return how many choices may be in the engine at a time: those whose prompts have half of what the
        bounds on waiting tokens leave, or else many long prompts could never be accepted."""
        config, longest = self._engine.config, max(map(len, self.prompts))
        bounds = (config.max_waiting_tokens, config.max_waiting_tokens_per_tenant)
        fit = (bound // (2 * max(longest, 1)) for bound in bounds if bound is not None)
        return max(1, min((AT_ONCE, *fit)))

    # The engine's requests

    async def prepare(self) -> None:
        """Build the constraints, before outputs are requested. Raises their errors and DeadlineExceeded. A
        cancellation stops all of it."""
        form, self._form = self._form, None  # it has what the client has sent
        if form is None:
            return
        try:
            async with asyncio.timeout(self._time_left()):
                guide, owner = self._context.guide, self._record.owner
                made, not_enforced = await form.constraints(guide, owner, len(self))
        except TimeoutError:
            wanted = self._options["adapter"] or ()
            named = ",".join(map(self._where, [wanted] if isinstance(wanted, str) else wanted))
            late = f"the request{named}: its grammar was not compiled within {self._deadline:g} s"
            raise DeadlineExceeded(late) from None
        except ConfigError as error:
            raise RequestInvalid(str(error)) from error
        self._record.left_out(not_enforced)
        self._params = [
            msgspec.structs.replace(params, constraint=constraint)
            for params, constraint in zip(self._params, made, strict=True)
        ]

    async def outputs(self, index: int) -> AsyncGenerator[tuple[RequestOutput, int], None]:
        """Yield the outputs of one choice, and how many log-probabilities and other numbers are new in each.
        Closing it aborts the engine's request. Raises what the engine raises."""
        numbers, params = self._prompt_scores(index) + self._written_ids(index), self._params[index]
        newest: RequestOutput | None = None
        self._so_far[index] = lambda: newest
        async with self._begun(index) as keywords:
            stream = self._engine.generate(self._prompts[index], params, **keywords)
            async with contextlib.aclosing(stream) as outputs:
                async for output in outputs:
                    more = len(output.logprobs_delta) * (1 + (params.logprobs or 0))
                    if output.pooled is not None:
                        more += 1 + len(output.pooled) // VALUES_PER_SCORE
                        # A list takes four times as much.
                        output.pooled = cast("list[float]", array("d", output.pooled))
                    self._hold(more)
                    newest = output
                    yield output, numbers + more
                    numbers = 0

    async def _last_output(self, index: int) -> RequestOutput:
        params = self._params[index]
        if params.logprobs is not None or params.pooling is not None:  # they count as they come
            async for output, _ in self.outputs(index):
                found = output
            return found

        def follow(so_far: SoFar) -> None:
            self._so_far[index] = so_far

        async with self._begun(index) as keywords:
            return await self._engine.complete(self._prompts[index], params, follow=follow, **keywords)

    @contextlib.asynccontextmanager
    async def _begun(self, index: int) -> AsyncIterator[RequestKeywords]:
        """Context of a choice, from its turn to its end. Yields its keywords."""
        async with self._room:
            if len(self) > 1:
                async with self._beginning:
                    await asyncio.sleep(0)  # one begins in each pass of the loop: there may be hundreds
            id_ = self._id if len(self) == 1 else f"{self._id}-{index}"
            try:
                yield {**self._options, "deadline": self._time_left(), "request_id": id_}
            finally:
                self._note_end(self._so_far[index]())

    def _time_left(self) -> float | None:
        """Return the seconds until the deadline, which counts from the request's arrival; a moment once it
        has passed, so that the engine says it."""
        if self._deadline is None:
            return None
        return max(0.001, self._record.started + self._deadline - time.perf_counter())

    # Log-probabilities and vectors

    @contextlib.contextmanager
    def _numbers_held(self) -> Iterator[None]:
        """Context in which log-probabilities and vectors are counted: those of prompts now, others as they
        come. Raises ApiError if requests hold too many."""
        scored = sum(map(self._prompt_scores, range(len(self))))
        if scored > MAX_SCORES:
            raise invalid(
                "prompt",
                f"{scored} log-probabilities of prompts, but one request may have at most {MAX_SCORES}; send "
                "fewer or shorter prompts, or ask for fewer of the most likely tokens",
            )
        try:
            self._hold(scored)
            yield
        finally:
            if self._held:
                self._context.numbers.give_back(self._tenant, self._held)

    def _hold(self, more: int) -> None:
        if more and not self._context.numbers.take(self._tenant, more):
            text = "too many log-probabilities or vectors are being computed; try again later"
            raise ApiError(429, text, code="engine_overloaded")
        self._held += more

    def _prompt_scores(self, index: int) -> int:
        """Return how many log-probabilities the prompt of one choice has."""
        most_likely = self._params[index].prompt_logprobs
        return 0 if most_likely is None else len(self._prompts[index]) * (1 + most_likely)

    def _written_ids(self, index: int, output: RequestOutput | None = None) -> int:
        """Return as how many log-probabilities the ids count that are written of a choice."""
        count = len(self._prompts[index]) + (0 if output is None else output.output_tokens)
        return count // VALUES_PER_SCORE if self._with_ids else 0

    async def _formed(self, numbers: int, form: Callable[[], T]) -> T:
        """Return ``form()``, which writes so many log-probabilities: if they are many, from a thread, in
        turns with other requests."""
        if numbers <= FORMED_IN_THREAD:
            return form()
        return await self._engine.text_work.run(SHORT + numbers * SCORE_BYTES, form, self._tenant)

    # What is sent

    async def __call__(self, scope: Scope, body: BoundedBody, send: Send) -> None:
        """Answer as an ASGI application. Raises what fails before anything is sent."""
        departure = departure_of(scope)
        gone = departure or asyncio.ensure_future(disconnected(body))
        try:
            with self._numbers_held():
                await _unless(self._answer(body, send), gone)
        except Exception as error:
            if not self._record.status:  # nothing has been sent
                raise
            api_error = self._record.refused_by(error, self._context.settings.reword)
            self._record.status = api_error.status
            if not isinstance(error, ClientDisconnected):
                with contextlib.suppress(ClientDisconnected):
                    await self._send(send, self._streamed.failure(api_error), last=True)
        finally:
            if departure is None:
                await end_tasks([gone])

    async def _answer(self, body: BoundedBody, send: Send) -> None:
        await self.prepare()
        body.release(self.kept)  # it has become tokens
        if self._is_stream:
            writing = asyncio.Lock()  # one choice at a time; the output of the others is collected meanwhile
            streams = [self._stream(index, send, writing) for index in range(len(self))]
            await (together(streams) if len(streams) > 1 else streams[0])
            await self._send(send, self._streamed.last_events(self.usage), last=True)
            return
        works = [self._last_output(index) for index in range(len(self))]
        outputs = await together(works) if len(works) > 1 else [await works[0]]
        for output in outputs:
            output.text_delta, output.token_ids_delta = output.text, output.token_ids
            output.logprobs_delta = output.logprobs or ()
        numbers = self._held + sum(self._written_ids(i, output) for i, output in enumerate(outputs))
        whole = await self._formed(numbers, lambda: self.reply.whole(outputs, self.usage))
        await respond(send, 200, [(b"content-type", b"application/json")], whole)

    @property
    def _streamed(self) -> StreamReply:
        assert isinstance(self.reply, StreamReply), "only some endpoints have streams"
        return self.reply

    async def _stream(self, index: int, send: Send, writing: asyncio.Lock) -> None:
        async with contextlib.aclosing(self.outputs(index)) as outputs:
            async for output, numbers in outputs:
                events = await self._formed(numbers, partial(self._streamed.events, index, output))
                if events is not None:
                    async with writing:
                        await self._send(send, events)

    async def _send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        if not self._record.status:
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": not last})

    # What is told of it

    @property
    def usage(self) -> Usage:
        """Sum the usage. A prompt counts once, however many choices it has."""
        found = [so_far() for so_far in self._so_far]
        firsts = found[:: len(self) // len(self.prompts)]
        cached = sum(output.cached_tokens for output in firsts if output is not None)
        return Usage.of(sum(map(len, self.prompts)), _tokens_of(found), cached)

    def _output_tokens(self) -> int:
        return _tokens_of([so_far() for so_far in self._so_far])

    def _note_end(self, output: RequestOutput | None) -> None:
        """Note a choice's end. It costs the same however many choices there are."""
        record = self._record
        record.output_tokens = (record.output_tokens or 0) + (output.output_tokens if output else 0)
        if output is None:
            return
        if output.ttft is not None:
            record.ttft = min(output.ttft, math.inf if record.ttft is None else record.ttft)
        if output.finish_reason:
            reasons = {output.finish_reason, *(record.finish_reason or output.finish_reason).split(",")}
            record.finish_reason = ",".join(sorted(reasons))


def _tokens_of(outputs: Iterable[RequestOutput | None]) -> int:
    return sum(output.output_tokens for output in outputs if output is not None)


async def _unless(work: Coroutine[Any, Any, T], gone: asyncio.Future[None]) -> T:
    """Return the result of ``work``, unless the client is ``gone`` first: then ``work`` is cancelled, and
    ClientDisconnected is raised."""
    limit = asyncio.timeout(None)  # so that the work needs no task of its own

    def end(_: asyncio.Future[None]) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended in the same pass of the loop
            limit.reschedule(0)

    gone.add_done_callback(end)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise ClientDisconnected from None
        raise
    finally:
        gone.remove_done_callback(end)
