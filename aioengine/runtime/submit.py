"""From what a caller asks for to an accepted request: checks, tokens, the adapter, the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import msgspec

from aioengine.core.state import AdapterEntry
from aioengine.errors import DeadlineExceeded, EngineOverloaded, RequestInvalid
from aioengine.request import Prompt, RequestOptions, SamplingParams, check_text
from aioengine.runtime.adapters import AdapterOps
from aioengine.runtime.assemble import Built
from aioengine.runtime.loop import Stepper
from aioengine.runtime.output_stream import OutputStream

LONG_TEXT = 4096
"""Prompts of more characters than this are tokenized in a thread, so that they do not hold up the loop."""


class Submitter:
    """``check_running`` raises if the engine accepts nothing (any more); ``work`` is where long texts are
    tokenized."""

    def __init__(
        self,
        stepper: Stepper,
        adapters: AdapterOps,
        parts: Built,
        *,
        work: Executor,
        check_running: Callable[[], None],
    ) -> None:
        self._stepper = stepper
        self._core = stepper.core
        self._adapters = adapters
        self._parts = parts
        self._work = work
        self._check_running = check_running
        self._jobs: set[Future[list[int]]] = set()
        self._made_up = 0
        self._resolving = 0

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        options: RequestOptions,
        request_id: str | None,
    ) -> OutputStream:
        """Have the core accept a request; see ``AsyncEngine.generate`` for arguments and errors."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestInvalid(f"params must be SamplingParams, not {type(params).__name__}")
        check_text("request_id", request_id)
        request_id = self._make_up_id() if request_id is None else request_id
        arrival = asyncio.get_running_loop().time()
        due = None if options.deadline is None else arrival + options.deadline
        adapter = options.adapter
        if adapter is not None:
            self._adapters.check_known(adapter)  # before the work of tokenizing
        tokens = await self._tokenize(prompt)
        self._check_prompt(tokens, params)
        self._check_params(params)
        if params.min_tokens and not params.ignore_eos:  # so that the sampler knows what must not come yet
            ends = (*params.stop_token_ids, *self._core.limits.eos_token_ids)
            params = msgspec.structs.replace(params, stop_token_ids=ends)
        entry = None if adapter is None else await self._find_adapter(adapter, request_id, due)
        self._check_running()  # it may have changed while a text was tokenized or an adapter resolved
        if request_id in self._core.requests:
            raise RequestInvalid(f"request_id={request_id!r} is in use by a request that has not ended")
        request = self._core.add_request(
            request_id,
            tokens,
            params,
            options,
            asyncio.get_running_loop().time(),
            adapter=entry,
            deadline=due,
        )
        text = None
        if self._parts.tokenizer is not None:
            text = self._parts.tokenizer.text_stream(
                params.skip_special_tokens, tuple(params.stop), params.include_stop_str_in_output
            )
        stream = OutputStream(request, text)
        self._stepper.streams[request_id] = stream
        self._stepper.wake()
        return stream

    def _make_up_id(self) -> str:
        while True:
            request_id = f"request-{self._made_up}"
            self._made_up += 1
            if request_id not in self._core.requests:
                return request_id

    async def _find_adapter(self, name: str, request_id: str, due: float | None) -> AdapterEntry:
        """The registered version, or else what the resolver finds before the request is due. Requests
        that wait for a resolver count as waiting."""
        if self._adapters.is_registered(name):
            return self._adapters.find(name)
        bound = self._core.limits.max_waiting
        if bound is not None and self._resolving + len(self._core.queues) >= bound:
            raise EngineOverloaded(
                f"request {request_id!r}: max_waiting={bound} requests wait, {self._resolving} of them for "
                "an adapter to be found; retry later, or raise max_waiting"
            )
        self._resolving += 1
        try:
            async with asyncio.timeout_at(due) as limit:
                return await self._adapters.acquire(name)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"request {request_id!r}: its deadline passed while adapter {name!r} was looked for"
            ) from None
        finally:
            self._resolving -= 1

    async def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list) and set(map(type, prompt)) <= {int}:
            return list(prompt)  # type: ignore[arg-type] # all of them are int
        if not isinstance(prompt, (str, list)):
            raise RequestInvalid(
                f"prompt must be str, list of token ids or list of messages, not {type(prompt).__name__}"
            )
        tokenizer = self._parts.tokenizer
        if tokenizer is None:
            raise RequestInvalid("the model has no tokenizer.json: give the prompt as a list of token ids")
        encode: Callable[[Any], list[int]] = (
            tokenizer.encode if isinstance(prompt, str) else tokenizer.encode_chat
        )
        if len(prompt) <= LONG_TEXT and isinstance(prompt, str):
            return encode(prompt)
        job = self._work.submit(encode, prompt)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)

    async def settled(self) -> None:
        """Wait for the texts that are being tokenized, also if nobody waits for them any more."""
        await asyncio.gather(*map(asyncio.wrap_future, list(self._jobs)), return_exceptions=True)

    def _check_prompt(self, tokens: list[int], params: SamplingParams) -> None:
        limit = self._parts.plan.max_model_len
        if not tokens:
            raise RequestInvalid("the prompt is empty: it must have at least one token")
        if len(tokens) > limit - (params.max_tokens > 0):
            raise RequestInvalid(
                f"the prompt has {len(tokens)} tokens and max_model_len={limit} leaves no room for "
                "output: shorten it, or raise max_model_len"
            )
        vocab = self._parts.spec.vocab_size
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise RequestInvalid(f"prompt token {bad} is outside the vocabulary 0..{vocab - 1}")

    def _check_params(self, params: SamplingParams) -> None:
        """What only the model can tell."""
        vocab = self._parts.spec.vocab_size
        for field, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if token >= vocab:
                    raise RequestInvalid(f"{field}: token {token} is outside the vocabulary 0..{vocab - 1}")
        if params.stop and self._parts.tokenizer is None:
            raise RequestInvalid(f"stop={params.stop!r}: needs a tokenizer, and the model has none")
