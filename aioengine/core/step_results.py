"""StepResults: applies the result of a step to the requests that were in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from math import isfinite, isnan
from typing import NamedTuple

from aioengine import events
from aioengine.core.batcher import Batcher
from aioengine.core.guard import PolicyGuard
from aioengine.core.speculation.drafts import learn
from aioengine.core.state import AdapterEntry, Request, Status
from aioengine.errors import AdapterInvalid, AioEngineError, RequestInvalid
from aioengine.request import FinishReason
from aioengine.step import Fault, SequenceWork, StepBatch, StepResult

TokensBefore = defaultdict[tuple[AdapterEntry | None, float | None, int], int]
"""The number of requests by adapter, the time of the token before those that each has got, and their
number."""

_Intervals = defaultdict[tuple[AdapterEntry | None, float], int]


End = Callable[[Request, events.EndReason, float, Exception | None], None]
"""Ends a request: ``Core.end``."""


class _Coming(NamedTuple):
    """A result that is being taken in."""

    batch: StepBatch
    result: StepResult
    ends: Sequence[float]
    """The end of each of its steps."""
    longest: float
    """The longest time between two of them."""
    before: TokensBefore | None
    """Filled with what :func:`token_intervals` needs, if that is wanted."""
    done: list[tuple[float, Request, FinishReason]]
    """Filled with the requests that end, when, and why."""


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
        before: TokensBefore | None,
    ) -> None:
        """Take in the result of ``batch``, in which ``requests`` were, in this order, and whose steps ended
        at ``ends``. ``before`` is filled with what :func:`token_intervals` needs, if that is wanted."""
        longest = max([after - first for first, after in pairwise(ends)], default=0.0)
        coming = _Coming(batch, result, ends, longest, before, [])
        self._take_rows(coming, requests)
        if len(ends) > 1:
            coming.done.sort(key=lambda end: end[0])
        for time, request, finish in coming.done:
            self._end(request, finish, time, None)

    def _take_rows(self, coming: _Coming, requests: Sequence[Request]) -> None:
        """Take in each row. Nearly all are plain decodes that got a token from each step and go on; for these
        this is the same as ``_take_row``, but quick."""
        result, ends, before, longest = coming.result, coming.ends, coming.before, coming.longest
        each, size, plain = len(ends), self._batcher.blocks.block_size, result.is_plain
        common = requests[0].last_token if requests else None
        """The time of the last token of nearly all."""
        adapters: list[AdapterEntry | None] = []
        until = 0
        for index, (request, count) in enumerate(zip(requests, result.counts, strict=True)):
            first, until = until, until + count
            known, last, new = request.tokens, request.last_token, result.tokens[first:until]
            if (
                not request.decodes
                or last is None
                or count != each
                or not plain
                or len(known) + each >= request.most_tokens
                or not request.stops.isdisjoint(new)
            ):
                if request.status is Status.RUNNING:
                    self._take_row(coming, index, request, new)
                continue
            known += new
            got = each
            if (sink := request.sink) is not None:
                left = sink.push(new, (), is_stop=False)
                if left is not None:
                    got = left
                    del known[len(known) - each + got :]
                    coming.done.append((ends[got - 1], request, "stop"))
            computed = request.computed + got
            if computed // size == request.computed // size:
                request.computed = computed
            else:
                self._batcher.advance(request, got)
            request.last_token = ends[got - 1]
            if last == common and got == each:
                adapters.append(request.adapter)
            elif before is not None:
                before[request.adapter, last, got] += 1
            gap, worst = ends[0] - last, request.worst_gap
            if gap < longest:
                gap = longest
            if worst is None or gap > worst:
                request.worst_gap = gap
        if before is not None:
            for adapter, rows in groupby(adapters):  # they are sorted by slot
                before[adapter, common, each] += len(list(rows))

    def _take_row(self, coming: _Coming, index: int, request: Request, new: Sequence[int]) -> None:
        """Take in the ``new`` tokens of one request: none, one or several."""
        batch, result, ends, longest, before, done = coming
        work, error, known = batch.sequences[index], result.errors.get(index), request.tokens
        now, count = ends[-1], len(new)
        computed = len(work.tokens) - len(work.draft) + (count - 1 if work.sample else 0)
        if work.draft and (count or error is not None):
            right = count - (error is None)
            learn(request, len(work.draft), right)
            told = events.TokensProposed(
                time=now, adapter=request.label, proposed=len(work.draft), accepted=right
            )
            self._guard.emit(told)
        if not request.is_plain and not self._take_extras(index, request, work, result, now):
            return
        if not new:
            self._batcher.advance(request, computed)
            self._take_error(request, error, now)
            return
        if index in result.forced:
            new = [*new, *result.forced[index]]
        finish: FinishReason | None = None
        if len(known) + len(new) >= request.most_tokens or not request.stops.isdisjoint(new):
            new, finish = _until_the_end(request, new)
            if not new:  # no token was asked for
                done.append((now, request, "length"))
                return
        known += new
        if request.sink is not None:
            left = request.sink.push(new, result.logprobs.get(index, ()), is_stop=finish == "stop")
            if left is not None:
                finish = "stop"
                del known[len(known) - len(new) + left :]
                new = new[:left]
        got = len(new)
        self._batcher.advance(request, min(computed, computed + got - count))
        time = ends[got - 1] if len(ends) > 1 else now
        last, request.last_token = request.last_token, time
        gap = longest
        if last is None:
            request.first_token = first = ends[0]
            seconds = first - request.arrival
            self._guard.outbox.append(  # not a change for the policy
                events.FirstToken(time=first, request_id=request.id, adapter=request.label, seconds=seconds)
            )
        else:
            gap = max(longest, ends[0] - last)
        if before is not None:
            before[request.adapter, last, got] += 1
        worst = request.worst_gap
        if (worst is None or gap > worst) and (last is not None or got > 1):
            request.worst_gap = gap
        if finish is not None:
            done.append((time, request, finish))
        else:
            self._take_error(request, error, time)

    def _take_error(self, request: Request, error: tuple[str, Fault] | None, now: float) -> None:
        """End a request that has no further token."""
        if error is not None:
            self._end(request, "error", now, _sampling_error(request, *error))

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
    counts: _Intervals = defaultdict(int)
    for (adapter, last, tokens), rows in before.items():
        if last is not None:
            counts[adapter, ends[0] - last] += rows
        if len(ends) == 1 and tokens > 1:
            counts[adapter, 0.0] += rows * (tokens - 1)
    found = [_intervals(counts)]
    for step, (first, after) in enumerate(pairwise(ends), 1):
        later: _Intervals = defaultdict(int)
        for (adapter, _, tokens), rows in before.items():
            if tokens > step:
                later[adapter, after - first] += rows
        found.append(_intervals(later))
    return found


def _intervals(counts: _Intervals) -> tuple[events.TokenInterval, ...]:
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
