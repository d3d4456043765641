"""A request's output on its way from the step loop to the caller that reads it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioengine.core.state import Request
from aioengine.request import FinishReason, RequestOutput, TokenLogprob
from aioengine.step import Sampled

if TYPE_CHECKING:
    from aioengine.model.text.detokenizer import TextStream


class OutputStream:
    """Gathers tokens and text; what has gathered when the reader comes is one :class:`RequestOutput`.

    So a slow reader costs no memory beyond its own output, and never holds up a step.
    """

    def __init__(self, request: Request, text: TextStream | None) -> None:
        self.request = request
        self._text_stream = text
        self._text = ""
        self._text_seen = 0
        self._tokens_seen = request.prompt_len
        self._logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._stop: str | int | None = None
        self._finish: FinishReason | None = None
        self._error: Exception | None = None
        self._last_token: float | None = None
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()

    def push(self, sampled: Sampled, now: float, *, is_stop: bool) -> bool:
        """Take in one token; True if the text now contains a stop string. ``is_stop``: the token ends
        the output, and is no part of its text unless ``include_stop_str_in_output``."""
        self._last_token = now
        self._ready.set()
        if self._logprobs is not None and sampled.logprob is not None:
            self._logprobs.append(sampled.logprob)
        params = self.request.params
        if is_stop:
            self._stop = sampled.token
        if self._text_stream is None or (is_stop and not params.include_stop_str_in_output):
            return False
        early = self.request.output_tokens <= params.min_tokens
        delta = self._text_stream.push([sampled.token], look=not early and not is_stop)
        self._text += delta.text
        if delta.stop is not None:
            self._stop = delta.stop
            return True
        return False

    def end(self, reason: str, error: Exception | None) -> None:
        """The request has ended; ``reason`` as in :class:`~aioengine.events.RequestEnded`."""
        if reason == "error":
            self._error = error
        else:
            self._finish = "stop" if reason == "stop" else "length" if reason == "length" else "abort"
            if self._text_stream is not None and not isinstance(self._stop, str):
                self._text += self._text_stream.finish()
                if self._text_stream.stopped is not None:  # seen only now that nothing follows
                    self._stop, self._finish = self._text_stream.stopped, "stop"
        self._ready.set()
        self._ended.set()

    async def last(self) -> RequestOutput:
        """Wait for the end, without being woken for each token. Raises as :meth:`next` does."""
        await self._ended.wait()
        return await self.next()

    async def next(self) -> RequestOutput:
        """Wait for something new. Raises the error that the request ended with, if it did."""
        await self._ready.wait()
        self._ready.clear()
        if self._error is not None:
            raise self._error
        request = self.request
        output = request.tokens[request.prompt_len :]
        result = RequestOutput(
            request_id=request.id,
            adapter=None if request.adapter is None else request.adapter.label,
            text_delta=self._text[self._text_seen :],
            token_ids_delta=request.tokens[self._tokens_seen :],
            text=self._text,
            token_ids=output,
            finished=self._finish is not None,
            finish_reason=self._finish,
            stop_reason=self._stop,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            prompt_token_ids=request.tokens[: request.prompt_len],
            prompt_logprobs=self._prompt(),
            cached_tokens=request.cached_tokens,
            arrival=request.arrival,
            first_token=request.first_token,
            last_token=self._last_token,
        )
        self._text_seen = len(self._text)
        self._tokens_seen = len(request.tokens)
        return result

    def _prompt(self) -> list[TokenLogprob | None] | None:
        """The prompt's log-probabilities when all are known; made once, because prompts may be long."""
        known = self.request.prompt_logprobs
        if self._prompt_logprobs is None and known is not None and not self.request.unscored:
            self._prompt_logprobs = [None, *known]
        return self._prompt_logprobs
