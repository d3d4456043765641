"""A request at the gateway: its output so far, from all replicas that have run it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from aioengine.errors import AioEngineError
from aioengine.fleet.wire import Delta
from aioengine.info import mix_name, without_versions
from aioengine.request import FinishReason, RequestOptions, SamplingParams, TokenLogprob
from aioengine.runtime.output import Answer, RequestOutput
from aioengine.schedulers.routing import RouteRequest

if TYPE_CHECKING:
    from aioengine.metrics.remote_spans import CallSpans


class Call:
    """A request that gathers deltas for one reader. ``params`` has a seed; ``contents`` has the digests of
    the versions that it names ("sql@2"). Once they are replaced, only some replicas have them."""

    def __init__(
        self,
        key: int,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        options: RequestOptions,
        now: float,
        contents: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.key = key
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.options = options
        adapter = options.adapter
        self.wanted = mix_name(adapter.items()) if isinstance(adapter, Mapping) else adapter
        """Name of its adapter, or of its mix, as it was asked for."""
        self.adapter = None if self.wanted is None else without_versions(self.wanted)
        """The same without versions."""
        self.contents = contents
        self.arrival = now
        self.deadline = None if options.deadline is None else now + options.deadline
        self.route: RouteRequest | None = None
        """Last request to the router."""
        self.replica: str | None = None
        """Replica that runs it; None if it runs nowhere."""
        self.tried: frozenset[str] = frozenset()
        self.content = self.asked_content
        """Digest of its adapter's content, or its mix's, once its replica has said it, or it is asked for."""
        self.migrations = 0
        """How often it lost its replica after it had begun. One that refuses it is not lost."""
        self.tokens: list[int] = list(options.output)
        self.spans: CallSpans | None = None
        """Set if it is traced."""
        self.ended = False
        """Whether it has ended."""
        self.wait: asyncio.Timeout | None = None
        """Its wait for a replica, while there is none."""
        self._answer = Answer(prompt, self.tokens, logprobs=params.logprobs is not None)
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._pooled: list[float] | None = None
        self._cached_tokens: int | None = None
        self._first: float | None = None
        self._last: float | None = None
        self._finish: FinishReason | None = None
        self._stop: str | int | None = None
        self._error: AioEngineError | None = None
        self._ready = asyncio.Event()
        """Set when there is something that the reader has not seen."""

    @property
    def asked_content(self) -> str:
        """Digest of what it must run on, before it has begun; "": any."""
        return self.contents.get(self.wanted or "", "")

    @property
    def begun(self) -> bool:
        return self._first is not None

    def take(self, delta: Delta, now: float) -> None:
        """Take in a replica's report on it."""
        if delta.tokens:
            self.tokens += delta.tokens
            self._last = now
            if self._first is None:
                self._first = now
        self._answer.add_text(delta.text)
        if self._answer.logprobs is not None:
            self._answer.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = delta.prompt_logprobs
        if delta.pooled is not None:
            self._pooled = delta.pooled
        if self._cached_tokens is None:
            self._cached_tokens = delta.cached_tokens
        if delta.finish is not None:
            self.finish(delta.finish, delta.stop)
        self._ready.set()

    def finish(self, reason: FinishReason, stop: str | int | None = None) -> None:
        self._finish, self._stop = reason, stop
        self.end()

    def fail(self, error: AioEngineError) -> None:
        self._error = error
        self.end()

    def end(self) -> None:
        """Note that it has ended; then it waits for no replica any more."""
        self.ended = True
        self._ready.set()
        if self.wait is not None and not self.wait.expired():
            self.wait.reschedule(0.0)

    async def next(self) -> RequestOutput:
        """Wait for new output. Raises the error that the request ended with, if any."""
        await self._ready.wait()
        self._ready.clear()
        if self._error is not None:
            raise self._error
        output = RequestOutput(
            request_id=self.request_id,
            adapter=self.wanted,
            finish_reason=self._finish,
            stop_reason=self._stop,
            prompt_tokens=len(self.prompt),
            prompt_logprobs=self._prompt_logprobs,
            pooled=self._pooled,
            cached_tokens=self._cached_tokens or 0,
            adapter_digest=self.content,
            arrival=self.arrival,
            first_token=self._first,
            last_token=self._last,
            answer=self._answer,
        )
        self._answer.note_seen(output)
        return output
