"""A request's output on its way from the step loop to the caller that reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from aioengine.core.state import Request
from aioengine.errors import RequestInvalid
from aioengine.events import EndReason
from aioengine.request import FinishReason, SamplingParams, TokenLogprob
from aioengine.runtime.output import GrowingText, Grown, RequestOutput

if TYPE_CHECKING:
    from aioengine.model.text.detokenizer import TextStream


_MOST_WAITING = 64
"""Tokens that wait for their text at most: all of a long output at once would take too long."""


class OutputText:
    """The text of an output that grows token by token; empty if there is no tokenizer.

    Where no stop string is looked for, tokens wait for their text until somebody reads it: then the next step
    computes already, and several tokens take little longer than one.
    """

    def __init__(self, stream: TextStream | None, params: SamplingParams) -> None:
        self.text = GrowingText()
        self.stop: str | int | None = None
        """The stop string or stop token that ended the output."""
        self._stream = stream
        self.is_empty = stream is None
        """Whether there is never any text."""
        self.waits = stream is not None and not params.stop
        """Whether tokens change nothing until the text is read."""
        self._params = params
        self._tokens = 0
        self._waiting: list[int] = []
        """Tokens that are not in the text yet."""

    def push(self, token: int, *, is_stop: bool) -> bool:
        """Add one token; returns True if the text now contains a stop string. ``is_stop``: the token ends the
        output and is not part of its text, unless ``include_stop_str_in_output``."""
        self._tokens += 1
        if is_stop:
            self.stop = token
        if self._stream is None or (is_stop and not self._params.include_stop_str_in_output):
            return False
        if not self._params.stop:
            self._waiting.append(token)
            if len(self._waiting) == _MOST_WAITING:
                self.settle()
            return False
        early = self._tokens <= self._params.min_tokens
        delta = self._stream.push([token], look=not early and not is_stop)
        self.text.add(delta.text)
        if delta.stop is not None:
            self.stop = delta.stop
        return delta.stop is not None

    def push_all(self, tokens: Sequence[int], ends: Collection[int]) -> None:
        """Add tokens that were delivered before. Raises RequestInvalid if more tokens follow a stop
        string."""
        for index, token in enumerate(tokens):
            if self.push(token, is_stop=token in ends) and index < len(tokens) - 1:
                raise RequestInvalid(f"output: token {index} completes a stop string, but more tokens follow")

    def settle(self) -> None:
        """Add the text of all tokens so far."""
        if self._waiting and self._stream is not None:
            self.text.add(self._stream.push(self._waiting, look=False).text)
            self._waiting.clear()

    def finish(self) -> bool:
        """Finish the text. Returns True if it contains a stop string only now."""
        if self._stream is None or isinstance(self.stop, str):
            return False
        self.settle()
        self.text.add(self._stream.finish())
        if self._stream.stopped is not None:
            self.stop = self._stream.stopped
        return self._stream.stopped is not None


class OutputStream:
    """Collects tokens and text; everything collected since the reader's last visit becomes one
    :class:`RequestOutput`.

    So a slow reader costs no memory beyond its own output, and never delays a step. ``text`` already contains
    the output that the request came with. The first ``replayed`` tokens were delivered before and are not
    passed on.
    """

    def __init__(self, request: Request, text: OutputText, *, replayed: int = 0) -> None:
        self.request = request
        self._text = text
        text.settle()
        self._text_seen = len(text.text)
        """Pieces of the text that were passed on."""
        self._tokens_seen = request.prompt_len + request.given
        self._replayed = replayed
        self._logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self._logprobs_seen = 0
        self._grown = Grown(request.tokens, request.tokens, request.prompt_len, text.text, self._logprobs)
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self._finish: FinishReason | None = None
        self._error: Exception | None = None
        self._read_at_end = False
        """Whether its reader waits for the end."""
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], *, is_stop: bool) -> int | None:
        """Add the last tokens of the request; see :class:`~aioengine.core.state.Sink`."""
        stopped: int | None = None
        if is_stop or self._replayed or not self._text.is_empty:
            for count, token in enumerate(tokens, 1):
                stops = self._text.push(token, is_stop=is_stop and count == len(tokens))
                if self._replayed:
                    self._replay()
                elif not self._read_at_end:
                    self._ready.set()
                if stops:
                    stopped = count
                    break
        elif not self._read_at_end:
            self._ready.set()
        if self._logprobs is not None:
            self._logprobs += logprobs[:stopped]
        return stopped

    def _replay(self) -> None:
        """Skip a token that was delivered before, and its text."""
        self._replayed -= 1
        self._tokens_seen += 1
        self._text.settle()
        self._text_seen = len(self._text.text)

    @property
    def waits_for_end(self) -> bool:
        return self._read_at_end and (self._text.is_empty or self._text.waits)

    def end(self, reason: EndReason, error: Exception | None) -> None:
        """End the stream, with the fields of :class:`~aioengine.events.RequestEnded`."""
        if reason == "error":
            self._error = error
        else:
            self._finish = reason
            if self._text.finish():
                self._finish = "stop"
        self._ready.set()
        self._ended.set()

    async def last(self) -> RequestOutput:
        """Wait for the end without waking up for each token. Raises as :meth:`next` does."""
        self._read_at_end = True
        await self._ended.wait()
        return await self.next()

    async def next(self) -> RequestOutput:
        """Wait for new output. Raises the error that the request ended with, if any."""
        await self._ready.wait()
        self._ready.clear()
        if self._error is not None:
            raise self._error
        output = self.so_far()
        self._text_seen, self._logprobs_seen = output.pieces, output.scores
        self._tokens_seen = output.prompt_tokens + output.output_tokens
        return output

    def so_far(self) -> RequestOutput:
        """Return the output so far, without waiting; its ``_delta`` fields have what is new."""
        request = self.request
        self._text.settle()
        tokens, pieces, logprobs = len(request.tokens), len(self._text.text), self._logprobs or ()
        return RequestOutput(
            request_id=request.id,
            adapter=request.adapter_name,
            text_delta=self._text.text.between(self._text_seen, pieces),
            token_ids_delta=request.tokens[self._tokens_seen :],
            logprobs_delta=logprobs[self._logprobs_seen :],
            finished=self._finish is not None,
            finish_reason=self._finish,
            stop_reason=self._text.stop,
            prompt_tokens=request.prompt_len,
            output_tokens=tokens - request.prompt_len,
            prompt_logprobs=self._prompt(),
            pooled=request.pooled if self._finish == "length" else None,
            cached_tokens=request.cached_tokens,
            pinned_tokens=request.pinned_tokens,
            adapter_digest=request.content,
            arrival=request.arrival,
            first_token=request.first_token,
            last_token=request.last_token,
            grown=self._grown,
            pieces=pieces,
            scores=len(logprobs),
        )

    def _prompt(self) -> list[TokenLogprob | None] | None:
        """Return the prompt's log-probabilities once all are known. They are built once, because prompts may
        be long."""
        known = self.request.prompt_logprobs
        if self._prompt_logprobs is None and known is not None and not self.request.unscored:
            self._prompt_logprobs = [None, *known]
        return self._prompt_logprobs
