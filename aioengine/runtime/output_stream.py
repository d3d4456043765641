"""A request's output on its way from the engine loop to the caller that reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from aioengine.core.state import Request, Status
from aioengine.events import EndReason
from aioengine.request import FinishReason, SamplingParams, TokenLogprob
from aioengine.runtime.output import Answer, RequestOutput

if TYPE_CHECKING:
    from aioengine.model.text.detokenizer import TextStream

_MOST_WAITING = 64
"""Tokens that wait for their text at most: all of a long output at once would take too long."""


class OutputStream:
    """Collects tokens and text; everything collected since the reader's last visit becomes one
    :class:`RequestOutput`. So a slow reader costs no memory beyond its own output, and never delays a step.

    Where no stop string is looked for, tokens wait for their text until somebody reads it: then the next step
    computes already, and several tokens take little longer than one.

    ``decoder`` makes the text; None: there is no tokenizer, and never any text.
    """

    request: Request
    """The request, once :meth:`attach` was called."""

    def __init__(self, params: SamplingParams, decoder: TextStream | None) -> None:
        self._params = params
        self._decoder = decoder
        self._answer = Answer(logprobs=params.logprobs is not None)
        self._taken = 0
        """Index up to which the answer's tokens are in the text."""
        self._stop_token: int | None = None
        self._finish: FinishReason | None = None
        self._error: Exception | None = None
        self._read_at_end = False
        """Whether its reader waits for the end."""
        self.waits_for_end = False
        """Whether nothing has to be done for a token before the end either."""
        self._ready = asyncio.Event()

    def add_given(self, tokens: Sequence[int], ends: Collection[int]) -> None:
        """Add the output that the request comes with, which was delivered before, up to a stop string."""
        given = self._answer.tokens = list[int]()
        for token in tokens:
            given.append(token)
            is_stop = token in ends and len(given) == len(tokens)
            if self.push([token], (), is_stop=is_stop) is not None:
                break
        self._decode(len(given))

    def attach(self, request: Request) -> None:
        """Begin to take the output of ``request``. If it has not been given the tokens that were added
        before, it decodes them again; they are not passed on."""
        self.request = request
        answer, added = self._answer, request.given or self._taken
        answer.prompt = answer.tokens = request.tokens
        answer.begin = request.prompt_len
        self._taken = answer.tokens_seen = request.prompt_len + added
        answer.pieces_seen = len(answer.pieces)
        answer.logprobs_seen = added - request.given
        self._ready.clear()

    @property
    def found_stop(self) -> bool:
        """Whether the text has reached a stop string."""
        return self._decoder is not None and self._decoder.stopped is not None

    # From the engine loop: see aioengine.core.state.Sink

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], *, is_stop: bool) -> int | None:
        answer, left = self._answer, None
        known = len(answer.tokens)
        if is_stop:
            self._stop_token = tokens[-1]
        if known > self._taken and not self._read_at_end:
            self._ready.set()
        if self._params.stop:
            left = self._find_stop(known - len(tokens), is_stop=is_stop)
        elif known - self._taken >= _MOST_WAITING:
            self._decode(known)
        if answer.logprobs is not None:
            answer.logprobs += logprobs[:left]
        return left

    def end(self, reason: EndReason, error: Exception | None) -> None:
        if reason == "error":
            self._error = error
        else:
            self._decode(len(self._answer.tokens))
            if self._decoder is not None:
                self._answer.add_text(self._decoder.finish())
            self._finish = "stop" if self.found_stop else reason
        self._ready.set()

    # To the reader

    async def last(self) -> RequestOutput:
        """Wait for the end without waking up for each token. Raises as :meth:`next` does."""
        self._read_at_end = True
        self.waits_for_end = self._decoder is None and self._answer.logprobs is None
        if self.request.status is not Status.ENDED:
            self._ready.clear()
        return await self.next()

    async def next(self) -> RequestOutput:
        """Wait for new output. Raises the error that the request ended with, if any."""
        await self._ready.wait()
        self._ready.clear()
        if self._error is not None:
            raise self._error
        output = self.so_far()
        self._answer.note_seen(output)
        return output

    def so_far(self) -> RequestOutput:
        """Return the output so far, without waiting; its ``_delta`` fields have what is new."""
        request = self.request
        self._decode(len(request.tokens))
        stop = self._decoder.stopped if self._decoder is not None else None
        return RequestOutput(
            request_id=request.id,
            adapter=request.adapter_name,
            finish_reason=self._finish,
            stop_reason=self._stop_token if stop is None else stop,
            prompt_tokens=request.prompt_len,
            prompt_logprobs=None if request.unscored else request.prompt_logprobs,
            pooled=request.pooled if self._finish == "length" else None,
            cached_tokens=request.cached_tokens,
            adapter_digest=request.content,
            arrival=request.arrival,
            first_token=request.first_token,
            last_token=request.last_token,
            answer=self._answer,
        )

    # Text

    def _find_stop(self, before: int, *, is_stop: bool) -> int | None:
        """Add the text of the tokens from index ``before`` on, one at a time, up to a stop string. Returns
        how many come up to it, if there is one."""
        known = len(self._answer.tokens)
        while not self.found_stop and self._taken < known:
            end = self._taken + 1
            early = end - self._answer.begin <= self._params.min_tokens
            self._decode(end, look=not early and not (is_stop and end == known))
        return self._taken - before if self.found_stop and self._taken <= known else None

    def _decode(self, end: int, *, look: bool = False) -> None:
        """Add the text of the tokens before index ``end``, and ``look`` for a stop string in it. A token that
        ends the output is not part of the text, unless ``include_stop_str_in_output``."""
        new = self._answer.tokens[self._taken : end]
        if not new:
            return
        self._taken = end
        last = self._stop_token is not None and end == len(self._answer.tokens)
        if last and not self._params.include_stop_str_in_output:
            new = new[:-1]
        if new and self._decoder is not None:
            self._answer.add_text(self._decoder.push(new, look=look).text)
