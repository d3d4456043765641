"""What comes back: a request's output, part by part; vectors, labels and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from aioengine.request import FinishReason, TokenLogprob


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
