"""StepResults: applies the result of a step to the requests that were in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite, isnan
from typing import Protocol

from aioengine import events
from aioengine.core.speculation.drafts import Speculation
from aioengine.core.state import AdapterEntry, Request, Status, label_of
from aioengine.errors import AdapterInvalid, AioEngineError, RequestInvalid
from aioengine.request import FinishReason, TokenLogprob
from aioengine.step import Fault, SequenceWork, StepBatch, StepResult

TokensBefore = list[tuple[AdapterEntry | None, float | None, int]]
"""For each request: its adapter, the time of the token before those that it has got, and their number."""


class End(Protocol):
    """Ends a request: ``Core.end``."""

    def __call__(
        self, request: Request, reason: events.EndReason, now: float, error: Exception | None = None
    ) -> None: ...


class StepResults:
    """Passes tokens on to the requests' sinks, and ends requests that are done.

    Args:
        advance: Counts a request's tokens as computed.
        emit: Takes an event after which the policy may decide differently.
        note: Takes an event that changes nothing for the policy.
    """

    def __init__(
        self,
        *,
        advance: Callable[[Request, int], None],
        speculation: Speculation | None,
        end: End,
        emit: Callable[[events.Event], None],
        note: Callable[[events.Event], None],
    ) -> None:
        self._advance = advance
        self._speculation = speculation
        self._end = end
        self._emit = emit
        self._note = note

    def take(
        self,
        requests: Sequence[Request],
        batch: StepBatch,
        result: StepResult,
        ends: Sequence[float],
        before: TokensBefore | None,
    ) -> None:
        """Take in the result of ``batch``, in which ``requests`` were, in this order.

        Args:
            ends: The end of each of its steps.
            before: Filled with what :func:`token_intervals` needs, if that is wanted.
        """
        plain, running, advance = result.is_plain, Status.RUNNING, self._advance
        first_end, now, several = ends[0], ends[-1], len(ends) > 1
        longest = max([after - first for first, after in pairwise(ends)], default=0.0)
        ended: list[tuple[float, Request, FinishReason]] = []
        logprobs: Sequence[TokenLogprob] = ()
        until = 0
        for index, (request, work, count) in enumerate(
            zip(requests, batch.sequences, result.counts, strict=True)
        ):
            first, until = until, until + count
            if request.status is not running:
                continue
            computed = len(work.tokens)
            if work.sample:
                computed += count - 1
            if work.draft:
                computed -= len(work.draft)
                if count or index in result.errors:
                    self._learn(request, work, count - (index not in result.errors), now)
            new = result.tokens[first:until]
            if not plain or not request.is_plain:
                if not self._take_extras(index, request, work, result, now):
                    continue
                if not new:
                    advance(request, computed)
                    self._take_error(index, request, result, now)
                    continue
                new = [*new, *result.forced.get(index, ())]
                logprobs = result.logprobs.get(index, ())
            elif not new:
                advance(request, computed)
                continue
            finish: FinishReason | None = None
            tokens = request.tokens
            if len(tokens) + len(new) >= request.most_tokens or not request.stops.isdisjoint(new):
                new, finish = _until_the_end(request, new)
                if not new:  # no token was asked for
                    ended.append((now, request, "length"))
                    continue
            tokens += new
            if (sink := request.sink) is not None:
                left = sink.push(new, logprobs, is_stop=finish == "stop")
                if left is not None:
                    finish = "stop"
                    del tokens[len(tokens) - len(new) + left :]
                    new = new[:left]
            got = len(new)
            advance(request, computed if got >= count else computed + got - count)
            time = ends[got - 1] if several else now
            last, request.last_token = request.last_token, time
            if last is None:
                request.first_token = first_end
                self._note_first(request, first_end)
            if before is not None:
                before.append((request.adapter, last, got))
            gap = longest if last is None else first_end - last
            if gap < longest:
                gap = longest
            worst = request.worst_gap
            if (worst is None or gap > worst) and (last is not None or got > 1):
                request.worst_gap = gap
            if finish is not None:
                ended.append((time, request, finish))
            elif not plain:
                self._take_error(index, request, result, time)
        if several and len(ended) > 1:
            ended.sort(key=lambda end: end[0])
        for time, request, finish in ended:
            self._end(request, finish, time)

    def _note_first(self, request: Request, now: float) -> None:
        self._note(  # not a change for the policy
            events.FirstToken(
                time=now,
                request_id=request.id,
                adapter=label_of(request),
                seconds=now - request.arrival,
            )
        )

    def _take_error(self, index: int, request: Request, result: StepResult, now: float) -> None:
        """End a request that has no further token."""
        if (error := result.errors.get(index)) is not None:
            self._end(request, "error", now, _sampling_error(request, *error))

    def _learn(self, request: Request, work: SequenceWork, right: int, now: float) -> None:
        """Learn that the first ``right`` of the proposed tokens were right."""
        if self._speculation is not None:
            self._speculation.learn(request, len(work.draft), right)
            self._emit(
                events.TokensProposed(
                    time=now,
                    adapter=label_of(request),
                    proposed=len(work.draft),
                    accepted=right,
                )
            )

    def _take_extras(
        self, index: int, request: Request, work: SequenceWork, result: StepResult, now: float
    ) -> bool:
        """Take in the scores of a prompt's tokens, and a vector. Returns False if the request has ended,
        because they are not numbers."""
        nan: str | None = None
        if work.score and request.prompt_logprobs is not None:
            known = len(request.prompt_logprobs) - work.start  # more than 0 after a preemption
            new = result.scored.get(index, ())[known:]
            if any(isnan(entry.logprob) for entry in new):
                nan = "the log-probability of a prompt token is not a number"
            else:
                request.prompt_logprobs += new
        if request.params.pooling is not None and not _pool(request, work, result.pooled.get(index, ())):
            nan = "a hidden state is not a number"
        if nan is not None:
            self._end(request, "error", now, _sampling_error(request, nan, "model"))
        return nan is None


def finish_reason(request: Request, token: int) -> FinishReason | None:
    """Return why the request ends with its last ``token``; None if it goes on."""
    if token in request.stops:
        return "stop"
    return "length" if len(request.tokens) >= request.most_tokens else None


def _until_the_end(request: Request, tokens: Sequence[int]) -> tuple[Sequence[int], FinishReason | None]:
    """Return those of a request's next ``tokens`` that it gets, and why it ends with them, if it does."""
    room = request.most_tokens - len(request.tokens)
    for count, token in enumerate(tokens[:room], 1):
        if token in request.stops:
            return tokens[:count], "stop"
    return tokens[:room], "length" if len(tokens) >= room else None


def token_intervals(before: TokensBefore, ends: Sequence[float]) -> list[tuple[events.TokenInterval, ...]]:
    """Return for each of the steps that ended at ``ends`` the times between its tokens and those before."""
    counts: Counter[tuple[AdapterEntry | None, float]] = Counter()
    for adapter, last, tokens in before:
        if last is not None:
            counts[adapter, ends[0] - last] += 1
        if len(ends) == 1 and tokens > 1:
            counts[adapter, 0.0] += tokens - 1
    found = [_intervals(counts)]
    for step, (first, after) in enumerate(pairwise(ends), 1):
        found.append(_intervals(Counter((adapter, after - first) for adapter, _, n in before if n > step)))
    return found


def _intervals(counts: Counter[tuple[AdapterEntry | None, float]]) -> tuple[events.TokenInterval, ...]:
    return tuple(
        [
            events.TokenInterval(None if entry is None else entry.label, seconds, tokens)
            for (entry, seconds), tokens in counts.items()
        ]
    )


def _pool(request: Request, work: SequenceWork, values: Sequence[float]) -> bool:
    """Add a step's part to the request's vector. Returns False if it is not finite."""
    if work.start == 0:  # at first, and again after a preemption
        request.pooled = None
    if values:
        known = request.pooled
        request.pooled = (
            list(values) if known is None else [a + b for a, b in zip(known, values, strict=True)]
        )
    return all(map(isfinite, values))


def _sampling_error(request: Request, error: str, fault: Fault) -> AioEngineError:
    if fault == "request":
        return RequestInvalid(f"request {request.id!r}: {error}")
    text = f"request {request.id!r} produced unusable logits ({error})"
    entry = request.adapter
    if entry is None:
        return AioEngineError(f"{text}; check the base model's weights and the dtype")
    return AdapterInvalid(f"{text}; check the adapter's weights", name=entry.label, path=entry.path)
