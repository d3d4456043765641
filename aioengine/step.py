"""Model steps and adapters' reads as plain data: the core's requests to a device, and the results.

Nothing here refers to live objects, so that a step can cross a process boundary unchanged; only a request's
``params.constraint`` is its caller's object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple, overload

import msgspec

from aioengine.request import SamplingParams, TokenLogprob


class OutputView(Sequence[int]):
    """Read-only view of a request's output up to now, so that a constraint reads only what is new, however
    long it is; a slice is a new list. ``history`` begins with ``begin`` tokens of the prompt; new tokens are
    appended to it. ``draft`` are tokens after it, proposed but not chosen yet."""

    __slots__ = ("_begin", "_draft", "_history", "_known")

    def __init__(self, history: Sequence[int], begin: int = 0, draft: Sequence[int] = ()) -> None:
        self._history = history
        self._begin = begin
        self._known = len(history) - begin
        self._draft = draft

    def __len__(self) -> int:
        return self._known + len(self._draft)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        places, begin, known = range(len(self))[index], self._begin, self._known
        if isinstance(places, int):
            return self._history[begin + places] if places < known else self._draft[places - known]
        if places.step != 1:
            return [self[place] for place in places]
        shown = self._history[begin + places.start : begin + min(places.stop, known)]
        return [*shown, *self._draft[max(places.start - known, 0) : max(places.stop - known, 0)]]

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (OutputView, list, tuple)) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment] # so Python marks what has no hash

    def begins_with(self, other: OutputView) -> bool:
        """Whether it begins with all tokens of ``other``; at once for another view of the same request."""
        same = 0
        if self._history is other._history and self._begin == other._begin:
            same = min(self._known, other._known)
        return self[same : len(other)] == other[same:]


@dataclass(slots=True)
class SequenceWork:
    """One sequence's share of a step: compute ``tokens`` at positions ``start..start+len(tokens)-1``. The
    core may use it again for the next step."""

    request_id: str
    slot: int
    """The adapter's slot, or -1 for the base model."""
    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    """KV blocks of positions ``0..start+len(tokens)-1``; the first also stands for those behind windows."""
    sample: bool
    """Whether a token is to be sampled: the last of ``tokens`` is the sequence's last known one."""
    params: SamplingParams
    seed: int
    history: Sequence[int]
    """Prompt followed by output so far."""
    prompt_len: int
    score: int = 0
    """Number of ``tokens`` whose successors' log-probabilities are to be reported."""
    draft: Sequence[int] = ()
    """Proposed tokens after ``history``, with which ``tokens`` end. A token is sampled after each of them, as
    long as all before it equal the sampled ones."""
    scale: float = 1.0
    """What the adapter in ``slot`` is multiplied by."""

    @property
    def output(self) -> OutputView:
        """The output in ``history``."""
        return OutputView(self.history, self.prompt_len)


class StepBatch(NamedTuple):
    """One model step. ``sequences`` are sorted by slot, base rows (-1) first."""

    step: int
    sequences: Sequence[SequenceWork]
    slot_ranks: Sequence[int]
    """Rank of the adapter in each slot, 0 where there is none."""
    again: bool = False
    """Whether the sequences are those of the step before, each of which decodes the token that it got."""
    steps: int = 1
    """Most steps that a device with ``repeats`` may take, each ``again``, up to the first in which a sequence
    gets a token that ends it. The block tables cover the first step."""
    until: float = inf
    """Time before which each of these steps after the first begins."""


Fault = Literal["model", "request"]
"""Cause of a sequence without a next token: logits that are not finite ("model"), or the request's own
constraint ("request")."""


class Sampled(NamedTuple):
    """The token sampled for one sequence or, in ``error``, the reason why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    error: str | None = None
    fault: Fault = "model"
    late: bool = False
    """Whether there is no token yet because the request's constraint is late."""
    forced: tuple[int, ...] = ()
    """Tokens, not computed yet, that follow ``token`` because the constraint leaves no choice."""


class StepResult(NamedTuple):
    """Result of a step, or of several that a device took at once."""

    tokens: Sequence[int]
    """The tokens of all sequences: those of the first one, then those of the second one, and so on."""
    counts: Sequence[int]
    """Number of tokens of each sequence: none without ``sample``, or if its constraint is late."""
    seconds: Sequence[float]
    """Duration of each step."""
    ends: Sequence[float] = ()
    """Time at the end of each step; (): there was one, which ends now."""
    forced: Mapping[int, Sequence[int]] = {}
    """By index of the sequence, as the others below: tokens that follow; see :class:`Sampled`."""
    logprobs: Mapping[int, Sequence[TokenLogprob]] = {}
    """Log-probabilities of its tokens."""
    errors: Mapping[int, tuple[str, Fault]] = {}
    """Why it has no token after these."""
    scored: Mapping[int, Sequence[TokenLogprob]] = {}
    """Answers to ``score``, where that is not 0."""
    pooled: Mapping[int, Sequence[float]] = {}
    """Numbers that a pooled sequence's tokens add to its vector."""

    @property
    def is_plain(self) -> bool:
        """Whether it has tokens and nothing else."""
        return not (self.forced or self.logprobs or self.errors or self.scored or self.pooled)

    @classmethod
    def of(cls, rows: Iterable[Sequence[Sampled]], seconds: float = 0.0) -> StepResult:
        """Return the result of a step from what was sampled for each sequence."""
        tokens: list[int] = []
        counts: list[int] = []
        forced: dict[int, Sequence[int]] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        errors: dict[int, tuple[str, Fault]] = {}
        for index, row in enumerate(rows):
            before = len(tokens)
            for token, logprob, error, fault, late, _ in row:
                if error is not None:
                    errors[index] = error, fault
                elif not late:
                    tokens.append(token)
                if logprob is not None:
                    logprobs.setdefault(index, []).append(logprob)
            if row and row[-1].forced:  # those after an earlier token are among the others
                forced[index] = row[-1].forced
            counts.append(len(tokens) - before)
        return cls(tokens, counts, (seconds,), (), forced, logprobs, errors)


BytesLike = bytes | bytearray | memoryview


class HeldFiles(msgspec.Struct, array_like=True, frozen=True, tag="held"):
    """An adapter's files in memory: the content of ``adapter_config.json``, and a path by which processes of
    this machine and user can open ``adapter_model.safetensors``."""

    config: bytes
    weights: str


class MixPart(msgspec.Struct, array_like=True, frozen=True):
    """One adapter of a mix."""

    name: str
    path: str
    weight: float
    digest: str
    """Digest that its content must have; "" if it is not known yet."""
    files: HeldFiles | None = None
    uid: int = -1
    """Its key in the CPU cache, if it is there."""


class MixFiles(msgspec.Struct, array_like=True, frozen=True, tag="mix"):
    """Adapters that are read and added up, in place of a folder."""

    parts: tuple[MixPart, ...]


AdapterSource = HeldFiles | MixFiles
"""Files that are read where there is no folder."""


class LoadedAdapter(NamedTuple):
    """An adapter that a device has read from disk into the CPU cache."""

    rank: int
    nbytes: int
    slot_nbytes: int
    """Bytes in a slot, on the rank with the largest share."""
    digest: str
    seconds: float = 0.0
    """Wall time of the load, with its retries."""
    labels: int = 0
    invocation: Sequence[int] = ()
    """Tokens from which on an activated LoRA adapter is applied; (): to all."""
    scalable: bool = True
    """Whether a step can multiply what it adds by a number: without DoRA and biases."""


Stalled = Callable[[], None]
"""Called once if a read makes no progress, so that others need not wait for it."""


class ReadOrder(NamedTuple):
    """An order to read an adapter's folder, or its ``files``, into the CPU cache under the key ``uid``."""

    uid: int
    name: str
    path: str
    stalled: Stalled
    files: AdapterSource | None = None
