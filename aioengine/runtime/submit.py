"""Turns a caller's arguments into an accepted request: checks, tokens, adapter, stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

import msgspec

from aioengine.core.state import Request
from aioengine.core.step_results import finish_reason
from aioengine.core.waiting_room import Ticket
from aioengine.errors import DeadlineExceeded, EngineOverloaded, PromptTooLong, RequestInvalid
from aioengine.request import Prompt, RequestOptions, SamplingParams, Wanted, check_text
from aioengine.runtime.assemble import Built
from aioengine.runtime.loop import Stepper
from aioengine.runtime.output_stream import OutputStream, OutputText
from aioengine.runtime.requests.continuation import check_output, replayed
from aioengine.runtime.sources.names import AdapterNames
from aioengine.runtime.text_work import SHORT, TextWork, size_of_json


class Submitter:
    """Accepts requests. ``check_running`` raises if the engine does not accept any."""

    def __init__(
        self,
        stepper: Stepper,
        adapters: AdapterNames,
        parts: Built,
        *,
        text_work: TextWork,
        check_running: Callable[[], None],
    ) -> None:
        self._stepper = stepper
        self._core = stepper.core
        self._adapters = adapters
        self._parts = parts
        self._text_work = text_work
        self._check_running = check_running
        self._made_up = 0
        self._token_type = list[Annotated[int, msgspec.Meta(ge=0, lt=parts.spec.vocab_size)]]

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        options: RequestOptions,
        request_id: str | None,
    ) -> OutputStream:
        """Check a request and add it to the core; see ``AsyncEngine.generate`` for arguments and errors."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestInvalid(f"params must be SamplingParams, not {type(params).__name__}")
        check_text("request_id", request_id)
        request_id = self._make_up_id() if request_id is None else request_id
        arrival = asyncio.get_running_loop().time()
        due = None if options.deadline is None else arrival + options.deadline
        adapter: Wanted = options.adapter if options.mix is None else options.mix
        # Before the work of tokenizing.
        counted = () if adapter is None else self._adapters.check_wanted(adapter)
        self._check_params(params)
        # A request that can never run must get this error, and not "try again later".
        tokens = self._token_ids(prompt, params)
        ticket = self._reserve(options.tenant, counted, arrival, None if tokens is None else len(tokens))
        entry, scale = None if adapter is None else self._adapters.current(adapter), 1.0

        def where() -> str:
            return "" if adapter is None else self._adapters.where(adapter)

        at_once = tokens is not None and (adapter is None or entry is not None) and not options.output
        try:
            async with _NOTHING if at_once else _holding(ticket, due, request_id, where):
                if tokens is None:
                    tokens = await self._tokenize(prompt, ticket.tenant)
                    self._check_prompt(tokens, params)
                    self._weigh(ticket, len(tokens))
                if adapter is not None and entry is None:
                    entry, scale = await self._adapters.acquire_wanted(adapter, ticket.tenant)
                text = self._output_text(params)
                given: Sequence[int] = ()
                replay = options.replay or params.logprobs is not None
                if options.output:
                    ends = self._ends(params)
                    self._check_output(options.output, tokens, params, ends)
                    if not replay:
                        given = options.output
                        await self._text_work.run(len(given), lambda: text.push_all(given, ends))
            self._check_running()  # it may have changed while a text was tokenized or an adapter resolved
            if entry is not None:
                self._adapters.check_lives(entry)
            if request_id in self._core.requests:
                raise RequestInvalid(f"request_id={request_id!r} is in use by a request that has not ended")
        except BaseException:
            ticket.leave()
            raise
        if (
            params.min_tokens and not params.ignore_eos
        ):  # so the sampler knows which tokens are not allowed yet
            params = msgspec.structs.replace(params, stop_token_ids=self._ends(params))
        if options.output and replay:
            vocab = self._parts.spec.vocab_size
            constraint = replayed(options.output, params.constraint, vocab=vocab)
            params = msgspec.structs.replace(params, constraint=constraint)
        request = self._core.add_request(
            request_id,
            tokens,
            params,
            options,
            asyncio.get_running_loop().time(),
            adapter=entry,
            scale=scale,
            deadline=due,
            ticket=ticket,
            given=given,
        )
        stream = request.sink = OutputStream(request, text, replayed=len(options.output) - len(given))
        self._end_if_complete(request, text)
        self._stepper.wake()
        return stream

    def _output_text(self, params: SamplingParams) -> OutputText:
        if self._parts.tokenizer is None:
            return OutputText(None, params)
        text = self._parts.tokenizer.text_stream(
            params.skip_special_tokens, tuple(params.stop), params.include_stop_str_in_output
        )
        return OutputText(text, params)

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """Return the tokens that end an output."""
        eos = () if params.ignore_eos else self._core.limits.eos_token_ids
        return (*params.stop_token_ids, *eos)

    def _check_output(
        self, output: Sequence[int], prompt: list[int], params: SamplingParams, ends: tuple[int, ...]
    ) -> None:
        check_output(
            output,
            params,
            prompt_len=len(prompt),
            max_model_len=self._parts.plan.max_model_len,
            vocab=self._parts.spec.vocab_size,
            ends=frozenset(ends),
        )

    def _end_if_complete(self, request: Request, text: OutputText) -> None:
        """End a request whose given output is already complete."""
        if request.given:
            finish = finish_reason(request, request.tokens[-1])
            if isinstance(text.stop, str):
                finish = "stop"
            if finish is not None:
                self._core.end(request, finish, asyncio.get_running_loop().time())

    def _make_up_id(self) -> str:
        while True:
            request_id = f"request-{self._made_up}"
            self._made_up += 1
            if request_id not in self._core.requests:
                return request_id

    def _reserve(self, tenant: str | None, adapters: Sequence[str], now: float, tokens: int | None) -> Ticket:
        """Reserve a waiting place, before the prompt is tokenized and the adapter looked up. Raises
        EngineOverloaded if there is none."""
        try:
            return self._core.reserve(tenant, adapters, now, tokens)
        finally:
            self._stepper.publish()  # another request may have lost its place, or this one was refused

    def _weigh(self, ticket: Ticket, tokens: int) -> None:
        try:
            self._core.weigh(ticket, tokens, asyncio.get_running_loop().time())
        finally:
            self._stepper.publish()  # as above

    async def _tokenize(self, prompt: Prompt, owner: str | None) -> list[int]:
        if not isinstance(prompt, (str, list)):
            raise RequestInvalid(
                f"prompt must be str, list of token ids or list of messages, not {type(prompt).__name__}"
            )
        limit = self._parts.plan.max_model_len
        tokenizer = self._parts.tokenizer
        if tokenizer is None:
            raise RequestInvalid("the model has no tokenizer.json: give the prompt as a list of token ids")
        if isinstance(prompt, str):
            text = prompt
            return await self._text_work.run(len(text), lambda: tokenizer.encode(text, limit=limit), owner)
        messages: Any = prompt

        def encode_chat() -> list[int]:
            return tokenizer.encode(tokenizer.render_chat(messages), False, limit=limit)

        # Never on the event loop, because a template may take any time.
        return await self._text_work.run(SHORT + size_of(messages, limit), encode_chat, owner)

    def _token_ids(self, prompt: object, params: SamplingParams) -> list[int] | None:
        """Copy and check a prompt of token ids; None for a text or chat messages."""
        if not isinstance(prompt, list):
            return None
        limit = self._parts.plan.max_model_len
        if len(prompt) > limit and type(prompt[0]) is int:
            raise PromptTooLong(len(prompt), limit)  # before they are looked at one by one
        try:
            tokens = msgspec.convert(prompt, self._token_type)  # one pass, in a fifth of the time of several
        except msgspec.ValidationError:
            if not set(map(type, prompt)) <= {int}:
                return None
            self._check_prompt(tokens := list(prompt), params)
        self._check_length(tokens, params)
        return tokens

    def _check_length(self, tokens: list[int], params: SamplingParams) -> None:
        limit = self._parts.plan.max_model_len
        if not tokens:
            raise RequestInvalid("the prompt is empty: it must have at least one token")
        if len(tokens) > limit - (params.max_tokens > 0):
            raise PromptTooLong(len(tokens), limit)

    def _check_prompt(self, tokens: list[int], params: SamplingParams) -> None:
        self._check_length(tokens, params)
        vocab = self._parts.spec.vocab_size
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise RequestInvalid(f"prompt token {bad} is outside the vocabulary 0..{vocab - 1}")

    def _check_params(self, params: SamplingParams) -> None:
        """Check the parameters that depend on the model."""
        vocab = self._parts.spec.vocab_size
        for field, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if token >= vocab:
                    raise RequestInvalid(f"{field}: token {token} is outside the vocabulary 0..{vocab - 1}")
        if params.stop and self._parts.tokenizer is None:
            raise RequestInvalid(f"stop={params.stop!r}: needs a tokenizer, and the model has none")


_NOTHING = contextlib.nullcontext()
"""Context of a request for which nothing has to be awaited."""


@contextlib.asynccontextmanager
async def _holding(
    ticket: Ticket, due: float | None, request_id: str, where: Callable[[], str]
) -> AsyncIterator[None]:
    """Give up what is awaited within at the request's deadline, or when another request displaces it.
    ``where`` names the adapter and says where it is."""
    lost: list[EngineOverloaded] = []

    def displaced(error: EngineOverloaded, now: float) -> None:
        lost.append(error)
        if not limit.expired():
            limit.reschedule(now)

    try:
        async with asyncio.timeout_at(due) as limit:
            ticket.displaced = displaced
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        late = f"request {request_id!r}{where()}: its deadline passed before it was accepted"
        raise lost[0] if lost else DeadlineExceeded(late) from None
    if lost:
        raise lost[0]


def size_of(messages: list[Any], limit: int) -> int:
    """Return the size of a chat, arguments of calls included.

    Raises RequestInvalid if there are more messages, or parts of a message, than a prompt can have tokens,
    because a template's work grows with their number.
    """
    for message in messages[: limit + 1]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and len(content) > limit:
            raise RequestInvalid(
                f"a message has {len(content)} parts, and at most {limit} are allowed: join them"
            )
    if len(messages) > limit:
        raise RequestInvalid(
            f"{len(messages)} messages: at most {limit} are allowed, as many as a prompt may have tokens"
        )
    return size_of_json(messages)
