"""RequestOps: requests as callers see them, and how one is accepted: checks, tokens, adapter, stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from aioengine.adapters.read_threads import SharedRead
from aioengine.config import EngineConfig
from aioengine.core import Core
from aioengine.core.step_results import finish_reason
from aioengine.core.waiting_room import Reservation
from aioengine.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineOverloaded,
    EngineStopped,
    PromptTooLong,
    RequestInvalid,
)
from aioengine.info import EngineState
from aioengine.memory_plan import MemoryPlan
from aioengine.model.spec import ModelSpec
from aioengine.request import PoolingKind, Prompt, RequestKeywords, RequestOptions, SamplingParams, Wanted
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.output import Classification, Embedding, OutputStream, RequestOutput, Scores, SoFar
from aioengine.runtime.requests import vectors
from aioengine.runtime.requests.continuation import Replayed
from aioengine.runtime.sources.mixes import Mixes
from aioengine.runtime.sources.names import AdapterNames
from aioengine.runtime.text_work import SHORT, TextWork, check_vocabulary, token_ids, tokenize
from aioengine.tasks import together

if TYPE_CHECKING:
    from aioengine.model.text.tokenizer import Tokenizer


class RequestOps:
    """An engine's requests."""

    config: EngineConfig
    _state: EngineState
    _core: Core
    _loop: EngineLoop
    _mixes: Mixes
    _names: AdapterNames
    _numbers: Iterator[int]
    """For the names of requests that have none."""
    label_names: SharedRead[list[str]]
    model_spec: ModelSpec
    plan: MemoryPlan
    text_work: TextWork
    tokenizer: Tokenizer | None

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one request; yields whenever there is new output, and at the end. Closing the iterator or
        cancelling the task aborts the request. ``keywords`` are the fields of :class:`RequestOptions`.

        Raises RequestInvalid (empty or too long prompt, unknown token, request id in use, ...), what
        :meth:`load_adapter` raises, EngineOverloaded (a bound on waiting requests is reached, or pinned
        adapters hold every slot), DeadlineExceeded, EngineStopped or EngineDead.
        """
        stream = await self._submit(prompt, params, keywords)
        try:
            while True:
                new = await stream.next()
                yield new
                if new.finished:
                    return
        finally:
            self._loop.abort(stream.request)

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        follow: Callable[[SoFar], None] | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> RequestOutput:
        """Run one request, as :meth:`generate` does, and return all of its output. When it is accepted,
        ``follow`` is given a function that returns its output so far."""
        stream = await self._submit(prompt, params, keywords)
        if follow is not None:
            follow(stream.so_far)
        try:
            return await stream.last()
        finally:
            self._loop.abort(stream.request)

    async def embed(
        self,
        prompt: Prompt,
        adapter: Wanted = None,
        pooling: PoolingKind | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        **keywords: Any,
    ) -> Embedding:
        """Turn a prompt into one vector, its last hidden states, pooled. ``normalize`` brings it to length 1,
        ``dimensions`` keeps only so many of its first numbers. Otherwise like :meth:`generate`."""
        output = await self.complete(prompt, vectors.pooling_params(pooling), adapter=adapter, **keywords)
        return vectors.embedding_of(output, normalize=normalize, dimensions=dimensions)

    async def classify(self, prompt: Prompt, adapter: Wanted = None, **keywords: Any) -> Classification:
        """Classify a prompt by the trained head of an adapter (PEFT's ``SEQ_CLS``). Raises RequestInvalid if
        it has none, and what :meth:`generate` raises."""
        output = await self.complete(prompt, vectors.pooling_params("classify"), adapter=adapter, **keywords)
        return vectors.classification_of(output, await self.label_names.result())

    async def score(
        self,
        query: str | list[int],
        documents: Sequence[str | list[int]],
        adapter: Wanted = None,
        *,
        tenant: str | None = None,
        **keywords: Any,
    ) -> Scores:
        """Score how well each document fits the query, each as a request of its own. An adapter with a head
        of one label scores the pair (0 to 1); without a head, it is the cosine of two vectors (-1 to 1).
        Raises RequestInvalid for a head of several labels, and what :meth:`generate` raises."""
        vectors.check_documents(query, documents)
        labels = await self.head_labels(adapter)
        if labels > 1:
            raise RequestInvalid(
                f"the adapter's head has {labels} labels, but a score needs a head of one label, or none; "
                "use classify"
            )
        prompts: list[Prompt] = [query, *documents]
        if labels:
            pair = partial(vectors.pair_tokens, self.tokenizer, self.plan.max_model_len, query)
            prompts = [
                await self.text_work.run(len(query) + len(document), partial(pair, document), tenant)
                for document in documents
            ]
        params = vectors.pooling_params("classify" if labels else None)
        outputs = await together(
            [self.complete(one, params, adapter=adapter, tenant=tenant, **keywords) for one in prompts]
        )
        pairs = [(0, index) for index in range(1, len(outputs))]
        size = SHORT + sum(len(output.pooled or ()) for output in outputs)
        scores = await self.text_work.run(size, lambda: vectors.scores_of(outputs, labels, pairs), tenant)
        tokens = sum(output.prompt_tokens for output in outputs)
        return Scores(scores=scores, prompt_tokens=tokens, adapter=outputs[0].adapter)

    async def head_labels(self, adapter: Wanted) -> int:
        """Return how many labels an adapter's head has; 0 without one, as for a mix. Loads the adapter."""
        name = vectors.scaled_adapter(adapter)
        if name is None:
            return 0
        self._check_lora()
        entry = await self._names.acquire(name)
        while not entry.digest:
            await self._names.read(entry, now=False)
            entry = await self._names.acquire(name)  # it may have been replaced meanwhile
        return entry.labels

    async def abort(self, request_id: str) -> bool:
        """End a request; its reader gets a last output with ``finish_reason="abort"``. Returns False if no
        such request is waiting or running."""
        request = self._core.requests.get(request_id)
        if request is not None:
            self._loop.abort(request)
        return request is not None

    # Acceptance

    def _check_running(self) -> None:
        """Raise an error if the engine accepts no requests."""
        if self._loop.dead is not None:
            raise self._loop.dead
        if self._state != "running":
            raise EngineStopped(f"the engine accepts no new requests: it is {self._state}")

    def _check_lora(self) -> None:
        """Raise an error if the engine accepts no requests, or has no adapters."""
        self._check_running()
        if self.config.lora is None:
            raise ConfigError("lora=None: this engine was configured without adapters")

    async def _submit(
        self, prompt: Prompt, params: SamplingParams | None, keywords: RequestKeywords
    ) -> OutputStream:
        """Check a request and add it to the core; see :meth:`generate` for arguments and errors."""
        self._check_running()
        options = RequestOptions(**keywords)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestInvalid(f"params must be SamplingParams, not {type(params).__name__}")
        request_id, adapter = options.request_id, options.adapter
        if request_id is None:
            made_up = (f"request-{number}" for number in self._numbers)
            request_id = next(one for one in made_up if one not in self._core.requests)
        loop = asyncio.get_running_loop()
        arrival, output = loop.time(), options.output
        due = None if options.deadline is None else arrival + options.deadline
        # Before the work of tokenizing.
        named, entry = (None, None) if adapter is None else self._names.check_wanted(options)
        self._check_params(params)
        # A request that can never run must get this error, and not "try again later".
        tokens = token_ids(prompt, vocab=self.model_spec.vocab_size, limit=self.plan.max_model_len)
        if tokens is not None:
            self._check_length(tokens, params)
        size = None if tokens is None else len(tokens)
        try:
            reservation = self._core.reserve(options.tenant, named, arrival, size)
        finally:
            self._loop.publish()  # this request was refused, or another one has lost its place
        scale = 1.0
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.text_stream(
                params.skip_special_tokens, tuple(params.stop), params.include_stop_str_in_output
            )
        stream = OutputStream(params, text)
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else self._core.limits.eos_token_ids))
        replay = bool(output) and (options.replay or params.logprobs is not None)
        given = () if replay else output
        at_once = tokens is not None and (adapter is None or entry is not None) and not output
        where = partial(self._names.where, options.named)
        try:
            async with contextlib.nullcontext() if at_once else _holding(reservation, due, request_id, where):
                if tokens is None:
                    tokens = await tokenize(
                        prompt, reservation.tenant, vocab=self.model_spec.vocab_size,
                        limit=self.plan.max_model_len, tokenizer=self.tokenizer, work=self.text_work,
                    )  # fmt: skip
                    self._check_length(tokens, params)
                    self._core.weigh(reservation, len(tokens), loop.time())
                    self._loop.publish()
                self._check_output(output, len(tokens), params)
                if output:
                    await self.text_work.run(len(output), lambda: stream.add_given(output, ends))
                if adapter is not None and not at_once:  # what was found may have been replaced
                    entry, scale = await self._mixes.acquire(adapter, reservation.tenant, loop.time())
            self._check_running()  # it may have changed while a text was tokenized or an adapter resolved
            if request_id in self._core.requests:
                raise RequestInvalid(f"request_id={request_id!r} is in use by a request that has not ended")
        except BaseException:
            reservation.leave()
            self._loop.publish()
            raise
        if params.min_tokens and not params.ignore_eos:
            # So the sampler knows which tokens are not allowed yet.
            params = msgspec.structs.replace(params, stop_token_ids=ends)
        if replay:
            constraint = Replayed(output, params.constraint, vocab=self.model_spec.vocab_size)
            params = msgspec.structs.replace(params, constraint=constraint)
        request = self._core.add_request(
            request_id, tokens, params, options, loop.time(),
            adapter=entry, scale=scale, deadline=due, reservation=reservation, given=given,
        )  # fmt: skip
        request.sink = stream
        stream.attach(request)
        if given:
            finish = "stop" if stream.found_stop else finish_reason(request, request.tokens[-1])
            if finish is not None:  # it is complete already
                self._core.end(request, finish, loop.time())
        self._loop.wake()
        return stream

    # Checks

    def _check_length(self, tokens: list[int], params: SamplingParams) -> None:
        if not tokens:
            raise RequestInvalid("the prompt is empty: it must have at least one token")
        if len(tokens) > self.plan.max_model_len - (params.max_tokens > 0):
            raise PromptTooLong(len(tokens), self.plan.max_model_len)

    def _check_params(self, params: SamplingParams) -> None:
        """Check the parameters that depend on the model."""
        check_vocabulary("logit_bias:", params.logit_bias, self.model_spec.vocab_size)
        check_vocabulary("stop_token_ids:", params.stop_token_ids, self.model_spec.vocab_size)
        if params.stop and self.tokenizer is None:
            raise RequestInvalid(f"stop={params.stop!r}: needs a tokenizer, and the model has none")

    def _check_output(self, output: Sequence[int], prompt_len: int, params: SamplingParams) -> None:
        made, limit = len(output), self.plan.max_model_len
        if made > params.max_tokens:
            raise RequestInvalid(f"output: has {made} tokens, more than max_tokens={params.max_tokens}")
        if prompt_len + made > limit:
            raise RequestInvalid(
                f"output: its {made} tokens and the prompt's {prompt_len} are more than max_model_len={limit}"
            )
        check_vocabulary("output:", output, self.model_spec.vocab_size)


@contextlib.asynccontextmanager
async def _holding(
    reservation: Reservation, due: float | None, request_id: str, where: Callable[[], str]
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
            reservation.displaced = displaced
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        late = f"request {request_id!r}{where()}: its deadline passed before it was accepted"
        raise lost[0] if lost else DeadlineExceeded(late) from None
    if lost:
        raise lost[0]
