"""RequestOutput: what comes back of a request, part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from aioengine.request import FinishReason, TokenLogprob


class GrowingText:
    """A text to which pieces are added, and of which any number of the first pieces can be read.

    Adding one takes the same time however long the text is. One thread adds; others may read.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._joined = (0, "")
        """A number of pieces, and their text."""

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self._pieces)

    def add(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)

    def between(self, begin: int, end: int) -> str:
        """Return the text of the pieces from ``begin`` to ``end``."""
        return "".join(self._pieces[begin:end])

    def first(self, count: int) -> str:
        """Return the text of the first ``count`` pieces."""
        known, text = self._joined
        if known > count:
            return self.between(0, count)
        if known < count:
            text += self.between(known, count)
            self._joined = (count, text)
        return text


class Grown(NamedTuple):
    """Lists that a request's outputs share. Items are only appended."""

    prompt: Sequence[int]
    """Begins with the prompt's tokens."""
    tokens: Sequence[int]
    """Tokens of the output, from index ``begin`` on."""
    begin: int
    text: GrowingText
    logprobs: Sequence[TokenLogprob] | None


@dataclass(kw_only=True, eq=False)
class RequestOutput:
    """Output of a request so far; the ``_delta`` fields have only the part since the last one.

    ``text``, ``token_ids``, ``logprobs`` and ``prompt_token_ids`` are built when they are asked for, so that
    an output takes the same time and memory however much came before it.
    """

    request_id: str
    adapter: str | None
    text_delta: str
    token_ids_delta: list[int]
    logprobs_delta: Sequence[TokenLogprob] = ()
    """One entry for each of ``token_ids_delta``, when asked for."""
    finished: bool
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the output, if one did."""
    prompt_tokens: int
    """Number of tokens in the prompt."""
    output_tokens: int
    """Number of tokens in the output so far."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One entry for each of ``prompt_token_ids``, None for the first, when asked for."""
    pooled: list[float] | None = None
    """The vector that ``pooling`` asks for, at the end: [hidden], or [labels] of a head."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was taken from the prefix cache."""
    pinned_tokens: int = 0
    """Prompt tokens whose KV the request has pinned in the prefix cache (``cache_pins``), those that were
    there already included."""
    adapter_digest: str = ""
    """SHA-256 of the adapter's content that it runs with (``AdapterInfo.digest``), or of a mix's parts and
    weights. "" for the base model, and until that has been read."""
    arrival: float = 0.0
    """Times are seconds on the engine's clock (the event loop's ``time()``)."""
    first_token: float | None = None
    last_token: float | None = None
    grown: Grown = field(repr=False)
    """Lists that the outputs of the request share."""
    pieces: int = field(repr=False)
    """Pieces of the text so far."""
    scores: int = field(repr=False, default=0)
    """Log-probabilities so far."""

    @cached_property
    def text(self) -> str:
        return self.grown.text.first(self.pieces)

    @cached_property
    def token_ids(self) -> list[int]:
        begin = self.grown.begin
        return list(self.grown.tokens[begin : begin + self.output_tokens])

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        return list(self.grown.prompt[: self.prompt_tokens])

    @cached_property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One entry for each of ``token_ids``, when asked for."""
        known = self.grown.logprobs
        return None if known is None else list(known[: self.scores])

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival


SoFar = Callable[[], RequestOutput | None]
"""Function that returns a request's output so far; None: there is none yet."""
