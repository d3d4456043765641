"""The engine requests behind one API request, and their results."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar, cast

import msgspec

from aioengine.config import EngineConfig
from aioengine.errors import DeadlineExceeded
from aioengine.request import CachePin, RequestOptions, SamplingParams, TokenConstraint
from aioengine.runtime.client import EngineClient
from aioengine.runtime.output import RequestOutput, SoFar
from aioengine.runtime.text_work import SHORT
from aioengine.server.access_log import RequestRecord
from aioengine.server.errors import ApiError
from aioengine.server.openai.api import PromptTokensDetails, Usage
from aioengine.tasks import together

T = TypeVar("T")


AT_ONCE = 128
"""Maximum engine requests of one API request at a time; more wait here, and not in the engine's queue."""
SCORE_BYTES = 64
"""Bytes of an answer for each log-probability in it."""
MAX_SCORES = 2**18
"""Maximum log-probabilities of prompts in one request: prompt tokens x (1 + most likely ones)."""
MAX_SCORES_HELD = 2**22
"""Maximum for all open requests together, of prompts and answers, at about 120 bytes each; one tenant may
have half of what others leave."""
VALUES_PER_SCORE = 16
"""Numbers of a vector, or token ids, that take as much memory or time as a log-probability."""


class Scores:
    """Count of the log-probabilities that open requests hold or will hold."""

    def __init__(self, retry_after: int) -> None:
        self._retry_after = retry_after
        self._held: Counter[str | None] = Counter()
        self._all = 0

    @contextmanager
    def claimed(self, tenant: str | None, prompts: int) -> Iterator[Callable[[int], None]]:
        """Context that counts ``prompts`` log-probabilities. It yields a function that counts more of them,
        as an answer grows. At its end all of them are given back. Raises ApiError if there are too many."""
        if prompts > MAX_SCORES:
            raise ApiError(
                400,
                f"prompt: {prompts} log-probabilities of prompts, but one request may have at most "
                f"{MAX_SCORES}; send fewer or shorter prompts, or ask for fewer of the most likely tokens",
                param="prompt",
                code="invalid_value",
            )
        own = 0

        def hold(more: int) -> None:
            nonlocal own
            held = self._held[tenant]
            if held + more > (MAX_SCORES_HELD - (self._all - held)) // 2:
                raise ApiError(
                    429,
                    "too many log-probabilities or vectors are being computed; try again later, or ask for "
                    "fewer of them",
                    type="rate_limit_error",
                    code="engine_overloaded",
                    retry_after=self._retry_after,
                )
            self._held[tenant] += more
            self._all += more
            own += more

        try:
            hold(prompts)
            yield hold
        finally:
            self._held[tenant] -= own
            self._all -= own
            if not self._held[tenant]:
                del self._held[tenant]


class Room:
    """Prompt tokens that one API request may have in the engine at a time: half of what the bounds on waiting
    tokens leave it, or else one with many long prompts could never be accepted.

    None is no bound. One prompt is let in whatever its length.
    """

    def __init__(self, config: EngineConfig) -> None:
        bounds = (config.max_waiting_tokens, config.max_waiting_tokens_per_tenant)
        self.tokens = min((bound // 2 for bound in bounds if bound is not None), default=None)
        self._held = 0
        self._freed: asyncio.Condition | None = None

    @asynccontextmanager
    async def holding(self, tokens: int) -> AsyncIterator[None]:
        """Context in which a prompt is in the engine; waits until there is room for it."""
        most = self.tokens
        if most is None:
            yield
            return
        freed = self._freed = self._freed or asyncio.Condition()
        async with freed:
            await freed.wait_for(lambda: self._held == 0 or self._held + tokens <= most)
            self._held += tokens
        try:
            yield
        finally:
            self._held -= tokens
            async with freed:
                freed.notify_all()


class Generation:
    """``len(prompts)`` x n choices. Every choice is a request of its own to the engine, which shares the
    prompt's blocks among them.

    Args:
        prompts: Token ids, one list for each prompt.
        params: One for each choice, ``n`` for the first prompt, then ``n`` for the second, ...
        options: Options of all choices.
        turn: Waits until a choice may begin; None if it may at once.
        constrain: Builds a constraint for one choice; None if the choices are unconstrained.
        with_ids: Whether the answer has the token ids of each choice and of its prompt.
        clock: Returns the time in seconds. The deadline of ``options`` counts from now on.
    """

    def __init__(
        self,
        engine: EngineClient,
        request_id: str,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        options: RequestOptions,
        record: RequestRecord,
        *,
        reply_id: str | None = None,
        scores: Scores | None = None,
        turn: Callable[[], Awaitable[None]] | None = None,
        constrain: Callable[[], Awaitable[TokenConstraint]] | None = None,
        with_ids: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert prompts and len(params) % len(prompts) == 0
        self.request_id = request_id
        self._engine = engine
        self.prompts = prompts
        self._params = params
        self.seed = params[0].seed
        """Seed of the first choice; those of the others follow from it."""
        self._options = options
        self._record = record
        self._turn = turn
        self._constrain = constrain
        self._has_waited = turn is not None or constrain is not None
        """Whether a choice does not begin at once."""
        self._clock, self._began = clock, clock()
        self._last: list[RequestOutput | None] = [None] * len(params)
        self._so_far: dict[int, SoFar] = {}
        """Functions that return the outputs so far of choices whose ends are waited for."""
        self._reasons: set[str] = set()
        """Why choices have ended."""
        self.reply_id = reply_id or request_id
        """The id that the client knows it by."""
        self.scored = sum(
            len(self._prompt(index)) * (1 + own.prompt_logprobs)
            for index, own in enumerate(params)
            if own.prompt_logprobs is not None
        )
        """Number of log-probabilities of the prompts that the request asks for."""
        self._with_ids = with_ids
        self._scores = scores
        self._room = Room(engine.config)
        self._hold: Callable[[int], None] = lambda _more: None
        record.prompt_tokens = sum(map(len, prompts))
        record.so_far = self._output_tokens

    def __len__(self) -> int:
        return len(self._params)

    def _prompt(self, index: int) -> list[int]:
        return self.prompts[index * len(self.prompts) // len(self._params)]

    def pin(self, pins: Sequence[CachePin]) -> None:
        """Have the requests, which have not begun, pin parts of their prompts."""
        self._options = msgspec.structs.replace(self._options, cache_pins=pins)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Context that claims memory for log-probabilities and vectors, as they come. Raises ApiError if
        requests hold too much."""
        none = not self.scored and all(own.logprobs is None and own.pooling is None for own in self._params)
        if self._scores is None or none:
            yield
            return
        with self._scores.claimed(self._options.tenant, self.scored) as self._hold:
            yield

    async def prepare(self) -> None:
        """Build the constraints, before outputs are requested. Raises their errors and DeadlineExceeded. A
        cancellation stops all of it."""
        if self._constrain is None:
            return
        made = self._params
        try:
            async with asyncio.timeout(self._time_left()):
                made = [
                    msgspec.structs.replace(params, constraint=await self._constrain())
                    for params in self._params
                ]
        except TimeoutError:
            late = f"its grammar was not compiled within {self._options.deadline:g} s"
            raise DeadlineExceeded(late) from None
        finally:
            self._constrain = None  # it has what the client has sent
        self._params = made

    def _time_left(self) -> float | None:
        """Return the seconds until the deadline; a moment once it has passed, so that the engine says it."""
        deadline = self._options.deadline
        return None if deadline is None else max(0.001, self._began + deadline - self._clock())

    def _options_now(self) -> RequestOptions:
        """Return the options of a choice that begins now. The engine counts a deadline from then on, so the
        time that the choice has waited is taken off."""
        if not self._has_waited:
            return self._options
        return msgspec.structs.replace(self._options, deadline=self._time_left())

    async def outputs(self, index: int) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of one choice. Closing it aborts the engine's request. Raises what the engine
        raises."""
        prompt = self._prompt(index)
        if self._turn is not None:
            await self._turn()
        async with self._room.holding(len(prompt)):
            stream = self._engine.generate(
                prompt, self._params[index], options=self._options_now(), request_id=self._id_of(index)
            )
            try:
                async for output in stream:
                    if output.logprobs_delta or output.pooled is not None:
                        self._hold_numbers(index, output)
                    self._last[index] = output
                    yield output
            finally:
                await stream.aclose()
                self._note(self._last[index])

    async def _last_output(self, index: int) -> RequestOutput:
        """Return the last output of one choice. Raises what the engine raises."""
        params = self._params[index]
        if params.logprobs is not None or params.pooling is not None:  # they count as they come
            async for output in self.outputs(index):
                found = output
            return found
        prompt, so_far = self._prompt(index), self._so_far

        def follow(output: SoFar) -> None:
            so_far[index] = output

        if self._turn is not None:
            await self._turn()
        async with self._room.holding(len(prompt)):
            try:
                options, own = self._options_now(), self._id_of(index)
                found = await self._engine.complete(
                    prompt, params, options=options, follow=follow, request_id=own
                )
                self._last[index] = found
                return found
            except BaseException:
                if index in so_far:
                    self._last[index] = so_far[index]()
                raise
            finally:
                so_far.pop(index, None)
                self._note(self._last[index])

    def _id_of(self, index: int) -> str:
        return self.request_id if len(self) == 1 else f"{self.request_id}-{index}"

    def _hold_numbers(self, index: int, output: RequestOutput) -> None:
        """Count the numbers that are new since the choice's last output, and store a vector compactly."""
        more = len(output.logprobs_delta) * (1 + (self._params[index].logprobs or 0))
        if output.pooled is not None:
            more += 1 + len(output.pooled) // VALUES_PER_SCORE
            output.pooled = cast("list[float]", array("d", output.pooled))  # a list takes four times as much
        self._hold(more)

    def numbers(self, outputs: Sequence[RequestOutput]) -> int:
        """Return how many log-probabilities, or values that take as much, are to be formatted for the
        prompts, and for the whole ``outputs``."""
        ids = sum(len(output.token_ids) for output in outputs) if self._with_ids else 0
        return (sum(map(self._prompt_values, range(len(self)))) + ids) // VALUES_PER_SCORE

    def prompt_numbers(self, index: int) -> int:
        """Return how many of them are to be formatted for the prompt of one choice."""
        return self._prompt_values(index) // VALUES_PER_SCORE

    def _prompt_values(self, index: int) -> int:
        most_likely = self._params[index].prompt_logprobs
        scored = 0 if most_likely is None else VALUES_PER_SCORE * (1 + most_likely)
        return len(self._prompt(index)) * (scored + self._with_ids)

    async def beside_the_loop(self, numbers: int, work: Callable[[], T]) -> T:
        """Run ``work()`` in a thread, in turns with other requests. It formats ``numbers`` log-probabilities
        or values of vectors."""
        size = SHORT + numbers * SCORE_BYTES
        return await self._engine.text_work.run(size, work, self._options.tenant)

    async def last_outputs(self) -> list[RequestOutput]:
        """Return the last output of every choice. If one fails, the others are aborted."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def last(index: int) -> RequestOutput:
            async with turns:
                return await self._last_output(index)

        if len(self) == 1:
            return [await self._last_output(0)]
        return await together([last(index) for index in range(len(self))])

    @property
    def usage(self) -> Usage:
        """Sum the usage. A prompt counts once, however many choices it has."""
        outputs = [output for output in self._last if output is not None]
        prompt = sum(map(len, self.prompts))
        completion = sum(output.output_tokens for output in outputs)
        per_prompt = len(self._params) // len(self.prompts)
        firsts = self._last[::per_prompt]
        cached = sum(output.cached_tokens for output in firsts if output is not None)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached),
        )

    def _output_tokens(self) -> int:
        now = (output() for output in list(self._so_far.values()))  # another thread may ask
        return sum(output.output_tokens for output in (*self._last, *now) if output is not None)

    def _note(self, output: RequestOutput | None) -> None:
        """Note a choice's end. It costs the same however many choices there are."""
        record = self._record
        record.output_tokens = (record.output_tokens or 0) + (output.output_tokens if output else 0)
        if output is None:
            return
        if output.ttft is not None:
            record.ttft = min(output.ttft, math.inf if record.ttft is None else record.ttft)
        if output.finish_reason:
            self._reasons.add(output.finish_reason)
            record.finish_reason = ",".join(sorted(self._reasons))
