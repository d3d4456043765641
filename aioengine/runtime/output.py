"""What comes back: a request's output, part by part, on its way to the caller that reads it; vectors, labels
and scores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from aioengine.core.state import Request, Status
from aioengine.events import EndReason
from aioengine.request import FinishReason, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from aioengine.model.text.detokenizer import TextStream

_MOST_WAITING = 64
"""Tokens that wait for their text at most: all of a long output at once would take too long."""


class Answer:
    """What a request has answered so far, and how much of it its reader has seen.

    The outputs of the request share it, because tokens, pieces of text and log-probabilities are only
    appended: adding to it takes the same time however long it is. One thread adds; others may read.

    Args:
        prompt: Begins with the prompt's tokens.
        tokens: The answer's tokens, from index ``begin`` on.
        logprobs: Whether there are log-probabilities.
    """

    def __init__(
        self, prompt: Sequence[int] = (), tokens: Sequence[int] = (), begin: int = 0, *, logprobs: bool
    ) -> None:
        self.prompt = prompt
        self.tokens = tokens
        self.begin = begin
        self.pieces: list[str] = []
        """The text."""
        self.logprobs: list[TokenLogprob] | None = [] if logprobs else None
        self.pieces_seen = self.logprobs_seen = 0
        self.tokens_seen = len(tokens)

    def add_text(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)

    def note_seen(self, output: RequestOutput) -> None:
        """Note that the reader has got ``output``."""
        self.pieces_seen, self.logprobs_seen = output.pieces, output.scores
        self.tokens_seen = self.begin + output.output_tokens


@dataclass(kw_only=True, eq=False)
class RequestOutput:
    """Output of a request so far; the ``_delta`` fields have only the part since the last one.

    ``text``, ``token_ids``, ``logprobs`` and ``prompt_token_ids`` are built when they are asked for, so that
    an output takes the same time and memory however much came before it.
    """

    request_id: str
    adapter: str | None
    text_delta: str = field(init=False)
    token_ids_delta: list[int] = field(init=False)
    logprobs_delta: Sequence[TokenLogprob] = field(init=False, default=())
    """One entry for each of ``token_ids_delta``, when asked for."""
    finished: bool = field(init=False)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the output, if one did."""
    prompt_tokens: int
    """Number of tokens in the prompt."""
    output_tokens: int = field(init=False)
    """Number of tokens in the output so far."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One entry for each of ``prompt_token_ids``, None for the first, when asked for."""
    pooled: list[float] | None = None
    """The vector that ``pooling`` asks for, at the end: [hidden], or [labels] of a head."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was taken from the prefix cache."""
    adapter_digest: str = ""
    """SHA-256 of the adapter's content that it runs with (``AdapterInfo.digest``), or of a mix's parts and
    weights. "" for the base model, and until that has been read."""
    arrival: float = 0.0
    """Times are seconds on the engine's clock (the event loop's ``time()``)."""
    first_token: float | None = None
    last_token: float | None = None
    answer: Answer = field(repr=False)
    """What the outputs of the request share."""

    def __post_init__(self) -> None:
        answer, logprobs = self.answer, self.answer.logprobs or ()
        self.pieces, self.scores = len(answer.pieces), len(logprobs)
        self.output_tokens = len(answer.tokens) - answer.begin
        self.finished = self.finish_reason is not None
        self.text_delta = "".join(answer.pieces[answer.pieces_seen :])
        self.token_ids_delta = list(answer.tokens[answer.tokens_seen :])
        self.logprobs_delta = logprobs[answer.logprobs_seen :]

    @cached_property
    def text(self) -> str:
        return "".join(self.answer.pieces[: self.pieces])

    @cached_property
    def token_ids(self) -> list[int]:
        begin = self.answer.begin
        return list(self.answer.tokens[begin : begin + self.output_tokens])

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        return list(self.answer.prompt[: self.prompt_tokens])

    @cached_property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One entry for each of ``token_ids``, when asked for."""
        known = self.answer.logprobs
        return None if known is None else known[: self.scores]

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival


SoFar = Callable[[], RequestOutput | None]
"""Function that returns a request's output so far; None: there is none yet."""


class Embedding(msgspec.Struct, kw_only=True, frozen=True):
    """Result of ``embed``: [hidden] or [dimensions] numbers."""

    vector: list[float]
    prompt_tokens: int
    adapter: str | None = None


class Classification(msgspec.Struct, kw_only=True, frozen=True):
    """Result of ``classify``: [labels] numbers, and the name of the most likely label. Of one label, the
    probability is the sigmoid of the logit."""

    logits: list[float]
    probabilities: list[float]
    label: str
    prompt_tokens: int
    adapter: str | None = None


class Scores(msgspec.Struct, kw_only=True, frozen=True):
    """Result of ``score``: one number for each document, in their order."""

    scores: list[float]
    prompt_tokens: int
    adapter: str | None = None


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
