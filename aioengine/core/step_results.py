"""StepResults: applies the result of a step to the requests that were in it.

The file is long because tokens come in three ways: of each row for itself, of a step that repeats the one
before, and of many steps at a time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise, repeat
from math import isfinite, isnan
from operator import itemgetter
from typing import NamedTuple, Protocol

from aioengine import events
from aioengine.core.blocks import BlockManager
from aioengine.core.decodes.counted import CountedDecodes
from aioengine.core.speculation.drafts import Speculation
from aioengine.core.state import AdapterEntry, Request, Status, label_of
from aioengine.errors import AdapterInvalid, AioEngineError, RequestInvalid
from aioengine.request import FinishReason
from aioengine.step import Decodes, Sampled, SequenceWork, StepBatch, StepResult

_interval: Callable[[tuple[str | None, float, int]], events.TokenInterval] = partial(
    tuple.__new__, events.TokenInterval
)
"""Makes one of its fields; there are very many."""


TAKEN = 64
"""Tokens of a request of which one is pushed at least, even if its sink takes many."""


class End(Protocol):
    """Ends a request: ``Core.end``."""

    def __call__(
        self, request: Request, reason: events.EndReason, now: float, error: Exception | None = None
    ) -> None: ...


class Steady(NamedTuple):
    """A step in flight, and its repetitions that are certain unless something happens."""

    steps: int
    """Number of steps at most, with the one in flight. Requests may end in the last one."""
    until: float
    """Time before which each of them must begin."""


class StepResults:
    """Passes tokens on to the requests' sinks, and ends requests that are done.

    Args:
        blocks: The requests' KV blocks.
        advance: Counts a request's tokens as computed.
        emit: Takes an event after which the policy may decide differently.
        note: Takes an event that changes nothing for the policy.
    """

    def __init__(
        self,
        *,
        blocks: BlockManager,
        advance: Callable[[Request, int], None],
        speculation: Speculation | None,
        end: End,
        emit: Callable[[events.Event], None],
        note: Callable[[events.Event], None],
    ) -> None:
        self._blocks = blocks
        self._advance = advance
        self._speculation = speculation
        self._end = end
        self._emit = emit
        self._note = note
        self.counts_intervals = True
        """Whether anybody wants the times between tokens; otherwise none are returned."""
        self.all_decoded = False
        """Whether all requests of the last step got a token each, and nothing else."""
        self._last = 0.0
        """Time of the tokens before those of a step that repeats the one before."""
        self._counted: tuple[Sequence[SequenceWork], Counter[AdapterEntry | None]] | None = None
        """Rows of such steps, and the numbers of requests by adapter."""

    def take(
        self, requests: Sequence[Request], batch: StepBatch, result: StepResult, now: float
    ) -> tuple[events.TokenInterval, ...]:
        """Take in the result of ``batch``, in which ``requests`` were, in this order.

        Returns the times between its tokens and the ones before.
        """
        if type(batch.sequences) is Decodes and self._take_decodes(requests, result.sampled, now):
            return self._same_intervals(requests, batch.sequences, now)
        before: list[tuple[AdapterEntry | None, float]] = []
        """Adapter and time of the previous token, for each token except a request's first."""
        advance, running, caching = self._advance, Status.RUNNING, self._blocks.prefix_caching
        counts = self.counts_intervals
        self.all_decoded = True
        rows = zip(requests, batch.sequences, result.sampled, strict=True)
        for index, (request, work, sampled) in enumerate(rows):
            if request.status is not running:
                self.all_decoded = False
                continue
            last = request.last_token
            if (
                last is None
                or sampled is None
                or sampled.late
                or sampled.error
                or sampled.forced
                or work.draft
                or work.score
            ):
                self.all_decoded = False
                self._take_row(index, request, work, result, now, before)
            else:
                # Fast path for nearly all tokens: does the same as _take_row and _take.
                if caching:
                    advance(request, len(work.tokens))
                else:
                    request.computed += len(work.tokens)
                token, gap, tokens = sampled.token, now - last, request.tokens
                tokens.append(token)
                request.last_token = now
                if counts:
                    before.append((request.adapter, last))
                if request.worst_gap is None or gap > request.worst_gap:
                    request.worst_gap = gap
                finish: FinishReason | None = None
                if request.stops and token in request.stops:
                    finish = "stop"
                elif len(tokens) >= request.most_tokens:
                    finish = "length"
                sink = request.sink
                if (
                    sink is not None
                    and (finish is not None or not sink.takes_many or len(tokens) % TAKEN == 0)
                    and sink.push(sampled, now, is_stop=finish == "stop")
                ):
                    finish = "stop"
                if finish is not None:
                    self._end(request, finish, now)
        return _intervals(Counter(before), now) if counts else ()

    def _take_decodes(self, requests: Sequence[Request], found: Sequence[Sampled | None], now: float) -> bool:
        """Take in a step that repeats the one before, in which each request got a token as well: does the
        same as ``take``. Returns False, and does nothing, if a request has ended or has no token."""
        running, caching = Status.RUNNING, self._blocks.prefix_caching
        for request, sampled in zip(requests, found, strict=True):
            if request.status is not running or sampled is None or sampled[0] < 0:
                return False
        self.all_decoded = True
        last = self._last = requests[0].last_token or 0.0
        gap = now - last
        for request, sampled in zip(requests, found, strict=True):
            assert sampled is not None
            token, tokens, worst, sink = sampled[0], request.tokens, request.worst_gap, request.sink
            if caching:
                self._advance(request, 1)
            else:
                request.computed += 1
            tokens.append(token)
            request.last_token = now
            if worst is None or gap > worst:
                request.worst_gap = gap
            count = len(tokens)
            if count >= request.most_tokens or token in request.stops:
                stops = token in request.stops
                stopped = sink is not None and sink.push(sampled, now, is_stop=stops)
                self._end(request, "stop" if stops or stopped else "length", now)
            elif (
                sink is not None
                and (not sink.takes_many or count % TAKEN == 0)
                and sink.push(sampled, now, is_stop=False)
            ):
                self._end(request, "stop", now)
        return True

    def _same_intervals(
        self, requests: Sequence[Request], decodes: Decodes, now: float
    ) -> tuple[events.TokenInterval, ...]:
        """Return the times between the tokens of such a step and the ones before, which all took as long."""
        if not self.counts_intervals:
            return ()
        if self._counted is None or self._counted[0] is not decodes.rows:
            counts = Counter(request.adapter for request in requests)
            self._counted = decodes.rows, counts
        return _intervals({(entry, self._last): tokens for entry, tokens in self._counted[1].items()}, now)

    def steady_steps(
        self, requests: Sequence[Request], batch: StepBatch, counted: CountedDecodes | None
    ) -> int:
        """Return how many steps like ``batch``, it included, these requests, and those that are counted, are
        certain to decode in: none ends before the last one, and there are blocks for all. 0 if one of them
        does more than decode plainly."""
        most = until_block = sys.maxsize
        blocks = self._blocks
        size, running = blocks.block_size, Status.RUNNING
        for request, work in zip(requests, batch.sequences, strict=True):
            sink, computed, known = request.sink, request.computed, len(request.tokens)
            if (
                known - computed != 1
                or request.last_token is None
                or work.score
                or request.status is not running
                or request.params.pooling is not None
                or (sink is not None and not sink.takes_many)
            ):
                return 0
            left = request.most_tokens - known
            if left < most:
                most = left
            left = len(request.blocks) * size - computed
            if left < until_block:
                until_block = left
        needed = 0
        if counted:
            most = min(most, counted.steps_left + (not requests))
            until_block = min(until_block, counted.until_block)
            needed = counted.blocks_for(most)
        if most > until_block:
            ends = (blocks.blocks_for(r.computed + most) - len(r.blocks) for r in requests)
            if needed + sum(ends) > blocks.num_free:
                most = until_block
        return most

    def take_many(
        self,
        requests: Sequence[Request],
        token: Sampled,
        ends: Sequence[float],
        running: Iterable[Request],
        *,
        begun: int,
    ) -> list[tuple[events.TokenInterval, ...]]:
        """Take in steps that end at ``ends``, in each of which all of ``requests`` decode, as ``take`` would
        one by one.

        Args:
            running: The same requests in order of admission, in which they get blocks.
            begun: Number of steps that have begun: one more than have ended, or as many.
        """
        if not requests:  # all of them are counted
            return [()] * len(ends)
        blocks = self._blocks
        count, size, caching = len(ends), blocks.block_size, blocks.prefix_caching
        first, last = ends[0], ends[-1]
        new = [token.token] * count
        longest = max((after - before for before, after in pairwise(ends)), default=0.0)
        befores: list[tuple[AdapterEntry | None, float]] = []
        todo: list[tuple[int, int, int, Request]] = []
        """(step, 0: needs a block, or 1: has filled one, place, request)"""
        for place, request in enumerate(running):
            if request.counted is not None:
                continue
            needs = len(request.blocks) * size - request.computed
            if needs < begun:
                todo += [(step, 0, place, request) for step in range(needs, begun, size)]
        for place, request in enumerate(requests):
            if caching:
                fills = size - 1 - request.computed % size
                todo += [(step, 1, place, request) for step in range(fills, count, size)]
            else:
                request.computed += count
            before = request.last_token or 0.0
            if self.counts_intervals:
                befores.append((request.adapter, before))
            gap = first - before
            if gap < longest:
                gap = longest
            if request.worst_gap is None or gap > request.worst_gap:
                request.worst_gap = gap
            request.tokens += new
            request.last_token = last
        advanced: dict[int, int] = {}
        for step, filled, _, request in sorted(todo, key=itemgetter(0, 1, 2)):
            if not filled:
                request.blocks += blocks.allocate(1)
            else:
                self._advance(request, step + 1 - advanced.get(request.seq, 0))
                advanced[request.seq] = step + 1
        if caching:
            for request in requests:
                self._advance(request, count - advanced.get(request.seq, 0))
        if not self.counts_intervals:
            return [()] * count
        intervals = [_intervals(Counter(befores), first)]
        tokens = Counter(adapter for adapter, _ in befores)
        labels = [None if entry is None else entry.label for entry in tokens]
        for earlier, later in pairwise(ends):
            rows = zip(labels, repeat(later - earlier), tokens.values(), strict=False)
            intervals.append(tuple(map(_interval, rows)))
        return intervals

    def _take_row(
        self,
        index: int,
        request: Request,
        work: SequenceWork,
        result: StepResult,
        now: float,
        before: list[tuple[AdapterEntry | None, float]],
    ) -> None:
        """Take in everything that the step has for one request: scores, a vector, and tokens, if there are
        any."""
        sampled = result.sampled[index]
        late = sampled is not None and sampled.late
        self._advance(request, len(work.tokens) - len(work.draft) - late)
        if work.score and request.prompt_logprobs is not None:
            known = len(request.prompt_logprobs) - work.start  # more than 0 after a preemption
            new = result.scored.get(index, ())[known:]
            if any(isnan(entry.logprob) for entry in new):
                nan = Sampled(-1, error="the log-probability of a prompt token is not a number")
                self._end(request, "error", now, _sampling_error(request, nan))
                return
            request.prompt_logprobs += new
        if request.params.pooling is not None and not _pool(request, work, result.pooled.get(index, ())):
            nan = Sampled(-1, error="a hidden state is not a number")
            self._end(request, "error", now, _sampling_error(request, nan))
            return
        if sampled is None or late:
            return
        followed = result.followed.get(index, ())
        if work.draft and self._speculation is not None:
            self._speculation.learn(request, len(work.draft), len(followed))
            self._emit(
                events.TokensProposed(
                    time=now,
                    adapter=label_of(request),
                    proposed=len(work.draft),
                    accepted=len(followed),
                )
            )
        goes_on = self._take(request, sampled, now, before)
        for token in followed:
            if not goes_on:
                break
            self._advance(request, 1)  # the previous token was proposed, and its KV has been computed
            goes_on = self._take(request, token, now, before)
        for forced in (followed[-1] if followed else sampled).forced:  # computed in the next step
            goes_on = goes_on and self._take(request, Sampled(forced), now, before)

    def _take(
        self,
        request: Request,
        sampled: Sampled,
        now: float,
        before: list[tuple[AdapterEntry | None, float]],
    ) -> bool:
        """Pass a request's next token on; False if the request ends."""
        if sampled.error is not None:
            self._end(request, "error", now, _sampling_error(request, sampled))
            return False
        if request.params.max_tokens == 0:
            self._end(request, "length", now)
            return False
        request.tokens.append(sampled.token)
        last, request.last_token = request.last_token, now
        if last is not None:
            before.append((request.adapter, last))
            if request.worst_gap is None or now - last > request.worst_gap:
                request.worst_gap = now - last
        else:
            request.first_token = now
            self._note(  # not a change for the policy
                events.FirstToken(
                    time=now,
                    request_id=request.id,
                    adapter=label_of(request),
                    seconds=now - request.arrival,
                )
            )
        finish = finish_reason(request, sampled.token)
        sink = request.sink
        if sink is not None and sink.push(sampled, now, is_stop=finish == "stop"):
            finish = "stop"
        if finish is not None:
            self._end(request, finish, now)
        return finish is None


def _intervals(
    before: Mapping[tuple[AdapterEntry | None, float], int], now: float
) -> tuple[events.TokenInterval, ...]:
    """Return the intervals of tokens that came at ``now``, by adapter and time of the token before."""
    rows = [
        (None if entry is None else entry.label, now - last, tokens)
        for (entry, last), tokens in before.items()
    ]
    return tuple(map(_interval, rows))


def finish_reason(request: Request, token: int) -> FinishReason | None:
    """Return why the request ends with ``token``; None if it goes on."""
    if request.stops and token in request.stops:
        return "stop"
    return "length" if len(request.tokens) >= request.most_tokens else None


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


def _sampling_error(request: Request, sampled: Sampled) -> AioEngineError:
    if sampled.fault == "request":
        return RequestInvalid(f"request {request.id!r}: {sampled.error}")
    text = f"request {request.id!r} produced unusable logits ({sampled.error})"
    entry = request.adapter
    if entry is None:
        return AioEngineError(f"{text}; check the base model's weights and the dtype")
    return AdapterInvalid(f"{text}; check the adapter's weights", name=entry.label, path=entry.path)
