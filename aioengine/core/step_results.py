"""StepResults: applies the result of a step to the requests that were in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import isfinite, isnan
from operator import itemgetter

from aioengine import events
from aioengine.core.batcher import Batcher
from aioengine.core.guard import PolicyGuard
from aioengine.core.state import AdapterEntry, Request, Status
from aioengine.errors import AdapterInvalid, AioEngineError, RequestInvalid
from aioengine.request import FinishReason, TokenLogprob
from aioengine.step import Fault, SequenceWork, StepBatch, StepResult

TokensBefore = tuple[AdapterEntry | None, float | None, int]
"""A request's adapter, the time of the token before those that it has got, and their number."""

End = Callable[[Request, events.EndReason, float, Exception | None], None]
"""Ends a request: ``Core.end``."""


class StepResults:
    """Passes tokens on to the requests' sinks, and ends requests that are done."""

    def __init__(self, batcher: Batcher, guard: PolicyGuard, end: End) -> None:
        self._batcher = batcher
        self._guard = guard
        self._end = end

    def take(
        self,
        requests: Sequence[Request],
        batch: StepBatch,
        result: StepResult,
        ends: Sequence[float],
        *,
        tells: bool,
    ) -> list[TokensBefore]:
        """Take in the result of ``batch``, in which ``requests`` were, in this order, and whose steps ended
        at ``ends``. Returns what :func:`token_intervals` needs, if it ``tells``."""
        longest = max([after - first for first, after in pairwise(ends)], default=0.0)
        each, size, tokens, plain = len(ends), self._batcher.blocks.block_size, result.tokens, result.is_plain
        begin, now = ends[0], ends[-1]
        done: list[tuple[float, Request, FinishReason]] = []
        told: list[TokensBefore] = []
        finish: FinishReason | None
        error: tuple[str, Fault] | None
        logprobs: Sequence[TokenLogprob]
        until = 0
        rows = zip(requests, batch.sequences, result.counts, strict=True)
        for index, (request, work, count) in enumerate(rows):
            first, until = until, until + count
            known, last, new = request.tokens, request.last_token, tokens[first:until]
            computed = got = count
            finish = error = None
            logprobs = ()
            if not (
                request.decodes
                and plain
                and count == each
                and len(known) + count < request.most_tokens
                and request.stops.isdisjoint(new)
            ):  # all but plain decodes that got a token from each step and go on, as nearly all do
                if request.status is not Status.RUNNING:
                    continue
                error = result.errors.get(index)
                computed = len(work.tokens) - len(work.draft) + (count - 1 if work.sample else 0)
                if work.draft and (count or error is not None):
                    self._learn_draft(request, len(work.draft), count - (error is None), now)
                if not request.is_plain and not self._take_extras(index, request, work, result, now):
                    continue
                logprobs = result.logprobs.get(index, ())
                if new:
                    new, finish = _until_the_end(request, [*new, *result.forced.get(index, ())])
                if not new:
                    if finish is not None:  # no token was asked for
                        done.append((now, request, finish))
                        continue
                    self._batcher.advance(request, computed)
                    if error is not None:
                        self._end(request, "error", now, _sampling_error(request, *error))
                    continue
                got = len(new)
            known += new
            sink = request.sink
            if sink is not None and not (sink.waits_for_end and finish is None):
                left = sink.push(new, logprobs, is_stop=finish == "stop")
                if left is not None:
                    del known[len(known) - got + left :]
                    got, finish = left, "stop"
            if got < count:
                computed -= count - got
            before = request.computed
            if before % size + computed < size:
                request.computed = before + computed
            else:
                self._batcher.advance(request, computed)
            if request.decodes:  # the next one
                work.start, work.tokens = before + computed, new if got == 1 else new[-1:]
            time = request.last_token = now if got >= each else ends[got - 1]
            if tells:
                told.append((request.adapter, last, got))
            gap, worst = longest, request.worst_gap
            if last is None:
                self._note_first(request, begin)
            elif begin - last > gap:
                gap = begin - last
            if (worst is None or gap > worst) and (last is not None or got > 1):
                request.worst_gap = gap
            if finish is not None:
                done.append((time, request, finish))
            elif error is not None:
                self._end(request, "error", time, _sampling_error(request, *error))
        for time, request, finish in sorted(done, key=itemgetter(0)):
            self._end(request, finish, time, None)
        return told

    def _note_first(self, request: Request, first: float) -> None:
        request.first_token, seconds = first, first - request.arrival
        self._guard.outbox.append(  # not a change for the policy
            events.FirstToken(time=first, request_id=request.id, adapter=request.label, seconds=seconds)
        )

    def _learn_draft(self, request: Request, proposed: int, right: int, now: float) -> None:
        if request.drafting is not None:
            request.drafting.learn(proposed, right)
        self._guard.emit(
            events.TokensProposed(time=now, adapter=request.label, proposed=proposed, accepted=right)
        )

    def _take_extras(
        self, index: int, request: Request, work: SequenceWork, result: StepResult, now: float
    ) -> bool:
        """Take in the scores of a prompt's tokens, and a vector. Returns False if the request has ended,
        because they are not numbers."""
        nan: str | None = None
        if work.score and request.prompt_logprobs is not None:
            known = len(request.prompt_logprobs) - 1 - work.start  # more than 0 after a preemption
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


def token_intervals(
    told: Iterable[TokensBefore], ends: Sequence[float]
) -> list[tuple[events.TokenInterval, ...]]:
    """Return for each of the steps that ended at ``ends`` the times between its tokens and those before."""
    found: list[Counter[tuple[AdapterEntry | None, float]]] = [Counter() for _ in ends]
    for (adapter, last, tokens), rows in Counter(told).items():
        if last is not None:
            found[0][adapter, ends[0] - last] += rows
        if len(ends) == 1 and tokens > 1:
            found[0][adapter, 0.0] += rows * (tokens - 1)
        for step in range(1, min(tokens, len(ends))):
            found[step][adapter, ends[step] - ends[step - 1]] += rows
    return [
        tuple(
            events.TokenInterval(None if entry is None else entry.label, seconds, tokens)
            for (entry, seconds), tokens in counts.items()
        )
        for counts in found
    ]


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
