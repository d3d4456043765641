"""Forms batches: which requests run, over how many tokens, in which KV blocks.

The file is long because the three depend on each other: a request runs only where it finds blocks, and gets
as many tokens as these hold.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import NamedTuple

from aioengine import events
from aioengine.core.blocks import BlockManager
from aioengine.core.guard import Tell
from aioengine.core.pacing import Allowance, Floor, Pacer, StepWork
from aioengine.core.prefixes.reached import pin_reached
from aioengine.core.prefixes.under_way import is_under_way
from aioengine.core.queues import RequestQueues
from aioengine.core.speculation.drafts import Speculation
from aioengine.core.state import Request, Status, label_of
from aioengine.core.turns import Turns
from aioengine.schedulers.policy import Location
from aioengine.step import SequenceWork, StepBatch

_Part = tuple[int, Request, SequenceWork]
"""A request in the batch: its slot, the request, and the range of tokens to compute."""
FIXED_TOKENS = 16.0
"""First guess of a step's fixed cost, in tokens."""
_slot_of = itemgetter(0)
_remaining = attrgetter("remaining")


class Formed(NamedTuple):
    """The sequences of a batch."""

    requests: list[Request]
    sequences: list[SequenceWork]
    """The range of tokens to compute for each request, in the same order."""
    is_plain: bool
    """Whether all running requests are in it, and each step gives each of them one token, and only that."""


class Batcher:
    """The running requests and their KV blocks. ``emit`` takes an event, ``tell`` an event for the policy,
    and ``refuse`` a refused item of its decision."""

    def __init__(
        self,
        blocks: BlockManager,
        queues: RequestQueues,
        running: dict[int, Request],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pacer: Pacer | None,
        speculation: Speculation | None = None,
        draft_constrained: bool = True,
        max_model_len: int,
        emit: Callable[[events.Event], None],
        tell: Tell,
        refuse: Callable[[str, str], None],
    ) -> None:
        self.blocks = blocks
        self.queues = queues
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pacer = pacer
        """None if the time of a step is not bounded."""
        self._turns = None if pacer is None else Turns(pacer)
        self.speculation = speculation
        self._draft_constrained = draft_constrained
        self._max_model_len = max_model_len
        self.running = running
        """The running requests by ``seq``, in order of admission."""
        self.preemptions = 0
        self._formed = Formed([], [], is_plain=False)
        """What was formed last."""
        self._work: StepWork | None = None
        """The quantities of what was formed last, as far as they are known."""
        self._now = 0.0
        """Time of the step that is formed, or in flight."""
        self._emit = emit
        self._tell = tell
        self._refuse = refuse

    def form_again(self, now: float, slot_ranks: Sequence[int]) -> Formed | None:
        """Form the last batch once more, a token later, if that is what ``form`` would do without newcomers.
        Nothing may have happened since but its tokens."""
        formed, size, growing = self._formed, self.blocks.block_size, list[Request]()
        if not formed.is_plain or self.speculation is not None:
            return None
        self._now = now
        for request, row in zip(formed.requests, formed.sequences, strict=True):
            row.start = start = request.computed
            row.tokens = request.tokens[start:]
            if start >= len(request.blocks) * size:
                growing.append(request)
        if self._turns is not None:
            self._work = _later(self._work) or StepWork.of(formed.sequences, slot_ranks)
            if not self._turns.all_fit(self._work):
                return None
        if not self.blocks.can_allocate(len(growing)):
            return None
        for request in growing:
            request.blocks += self.blocks.allocate(1)
        return formed

    def certain_steps(self) -> int:
        """Return the number of steps with the sequences of the last batch that are certain, unless something
        happens: no request ends before the last one, there are blocks for all, and nobody reads tokens
        before."""
        formed = self._formed
        if not formed.is_plain or self.speculation is not None:
            return 1
        blocks, most = self.blocks, sys.maxsize
        for request in formed.requests:
            if request.sink is not None and not request.sink.waits_for_end:
                return 1
            if request.computed < request.prompt_len:  # the end of a prompt is another step than a decode
                return 1
            left = request.most_tokens - len(request.tokens)
            if left < most:
                most = left
        return min(most, 1 + blocks.num_free // len(formed.requests) * blocks.block_size)

    def work_of(self, batch: StepBatch) -> StepWork:
        """Return the quantities of a batch, the one that was formed last."""
        if not batch.again or self._work is None:
            return StepWork.of(batch.sequences, batch.slot_ranks)
        return self._work

    def form(
        self,
        admit: Sequence[Request],
        now: float,
        slot_ranks: Sequence[int] = (),
    ) -> Formed:
        """Form a batch: a token for each running request that decodes, then chunks of prompts of running
        requests and of those in ``admit``, in the policy's order; sorted by slot. Where decodes alone take
        too long, requests of a tenant with many take turns.

        Without a pacer the running ones' chunks come first, in order of admission. With one, half of the
        tokens go to the oldest, so that it always advances; the rest go to the requests with the fewest
        tokens left, so that a short prompt does not wait for long ones. The oldest, the shortest and the
        first newcomer get a chunk, however little time there is, and so do further short ones and newcomers
        that need no more than a chunk together. A newcomer waits if one before it computes what it can share.
        """
        self._now = now
        self._work = None
        if self.blocks.window is not None:  # no step is in flight that has these blocks
            for request in self.running.values():
                request.freed = self.blocks.give_back(request.blocks, request.freed, request.computed)
        work: list[_Part] = []
        preemptions = self.preemptions
        decodes, growing, prefills = list[Request](), list[Request](), deque[Request]()
        size = self.blocks.block_size
        room = self.max_num_batched_tokens
        forced = list[Request]()
        plain = self.blocks.window is None
        for request in self.running.values():
            known, computed = len(request.tokens), request.computed
            plain = plain and request.is_plain
            if known - computed > 1:
                if computed < request.started:
                    prefills.append(request)
                    continue
                forced.append(request)
            decodes.append(request)
            if known > len(request.blocks) * size:
                growing.append(request)
        if self._turns is not None:
            decodes, every = self._turns.choose(decodes, self.running.values()), len(decodes)
            if len(decodes) < every:
                chosen = {request.seq for request in decodes}
                growing = [request for request in growing if request.seq in chosen]
                forced = [request for request in forced if request.seq in chosen]
        # Growing one request may preempt another one of them, or itself.
        for request in growing:
            if request.status is Status.RUNNING:
                self._has_blocks(request, request.remaining, now)
        if self.preemptions > preemptions:
            decodes = [request for request in decodes if request.status is Status.RUNNING]
        room -= len(decodes)
        if forced:
            work += self._unfinished(forced, decodes, room, slot_ranks)
            later = {request.seq for _, request, _ in work}
            decodes = [request for request in decodes if request.seq not in later]
            room -= sum(len(part.tokens) - 1 for _, _, part in work)
            room -= sum(request.remaining - 1 for request in decodes)
        drafts = self._drafts(decodes, room, slot_ranks)
        for request in decodes:
            draft = drafts.get(request.seq, ())
            work.append(_part(request, request.remaining, draft) if draft else _decode_part(request))
            room -= len(draft)
        if self.preemptions > preemptions:  # short of blocks
            admit = ()
        allowance = Allowance(room)
        oldest, prompts = None, list(prefills)
        if self.pacer is not None and (prefills or admit):
            allowance = self.pacer.allowance(StepWork.of((part for _, _, part in work), slot_ranks), room)
            if prefills:
                oldest = prefills.popleft()
                allowance.hold(oldest)
                prefills = deque(sorted(prefills, key=_remaining))
        short, new = Floor(), Floor()
        for request in self._admissible(admit):
            while prefills and (oldest is None or prefills[0].remaining <= request.remaining):
                self._compute(prefills.popleft(), allowance, short, work, now)
            if prompts and is_under_way(request, prompts, self.blocks):
                continue
            # Stop at the first that does not fit: it would starve if smaller ones passed it.
            if not allowance.has_room(request, new) or not self._start(request, now):
                break
            prompts.append(request)
            self._compute(request, allowance, new, work, now)
        for request in prefills:
            self._compute(request, allowance, short, work, now)
        if oldest is not None:
            allowance.give_back()
            self._compute(oldest, allowance, Floor(), work, now)
        if self.preemptions > preemptions:  # a request in ``work`` may have lost its blocks to a later one
            work = [part for part in work if part[1].status is Status.RUNNING]
        work.sort(key=_slot_of)
        plain = plain and not forced and len(work) == len(decodes) == len(self.running)
        self._formed = Formed([request for _, request, _ in work], [part for _, _, part in work], plain)
        return self._formed

    def _unfinished(
        self, forced: Sequence[Request], decodes: Sequence[Request], room: int, slot_ranks: Sequence[int]
    ) -> list[_Part]:
        """Make the work of the requests with ``forced`` tokens that cannot compute all of them in this step.

        Each computes at least one token, as all ``decodes`` do, so forced tokens make no request slower than
        without, and none stands still. What the room and the step's time allow beyond that goes to those with
        the fewest first.
        """
        allowance = Allowance(room)
        if self.pacer is not None:
            each = StepWork.of((_part(request, 1)[2] for request in decodes), slot_ranks)
            allowance = self.pacer.allowance_of_decodes(each, room)
        parts = list[_Part]()
        for request in sorted(forced, key=_remaining):
            if request.status is Status.RUNNING:
                tokens = 1 + allowance.take_more(request, request.remaining - 1)
                if tokens < request.remaining:
                    parts.append(_part(request, tokens))
        return parts

    def _drafts(
        self, decodes: Sequence[Request], room: int, slot_ranks: Sequence[int]
    ) -> dict[int, list[int]]:
        """Choose the tokens that are proposed to each request, by its ``seq``. It preempts no request, and
        leaves half of the room to prompts."""
        if self.speculation is None or not decodes:
            return {}
        limits = [self._draft_limit(request) for request in decodes]
        fixed, room = FIXED_TOKENS, room // 2
        if self.pacer is not None:
            each = StepWork.of((_part(request, request.remaining)[2] for request in decodes), slot_ranks)
            fixed, room = self.pacer.fixed_tokens(each), min(room, self.pacer.drafts(each))
        drafts = zip(decodes, self.speculation.propose(decodes, limits, fixed, room), strict=True)
        return {
            request.seq: draft
            for request, draft in drafts
            if draft and self._may_grow(request, request.remaining + len(draft))
        }

    def _draft_limit(self, request: Request) -> int:
        """Return how many tokens may be proposed to a request. A step chooses one more than that."""
        params = request.params
        if request.unscored or (params.constraint is not None and not self._draft_constrained):
            return 0
        left = min(params.max_tokens - request.output_tokens, self._max_model_len - len(request.tokens))
        return left - 1

    def _may_grow(self, request: Request, tokens: int) -> bool:
        """Give a request blocks for this many more tokens, if they are free."""
        new = self.blocks.blocks_for(request.computed + tokens) - len(request.blocks)
        if new > 0:
            if not self.blocks.can_allocate(new + self.blocks.kept_beside(())):
                return False
            request.blocks += self.blocks.allocate(new)
        return True

    def _compute(
        self, request: Request, allowance: Allowance, floor: Floor, work: list[_Part], now: float
    ) -> None:
        """Add a chunk of the request's prompt, if the budget allows one."""
        if request.status is Status.RUNNING:
            tokens = allowance.take(request, floor)
            if tokens > 0 and self._has_blocks(request, tokens, now):
                work.append(_part(request, tokens))

    def _has_blocks(self, request: Request, tokens: int, now: float) -> bool:
        """Whether blocks for this many more tokens are free, or can be made free."""
        until = request.computed + tokens
        return until <= len(request.blocks) * self.blocks.block_size or self._grow(request, until, now)

    def _admissible(self, admit: Sequence[Request]) -> Iterator[Request]:
        """Return the requests that may be admitted now; the others are refused."""
        for request in admit:
            if request.status is not Status.WAITING:
                self._refuse("admit_not_waiting", request.id)
                continue
            entry = request.adapter
            if entry is not None and entry.location is not Location.SLOT:
                self._refuse("admit_adapter_not_ready", request.id)
                continue
            if len(self.running) >= self.max_num_seqs:
                self._refuse("admit_over_max_num_seqs", request.id)
                continue
            yield request

    def _start(self, request: Request, now: float) -> bool:
        """Move a request from WAITING to RUNNING with blocks for all its known tokens, as many as possible
        from the prefix cache. Where every layer has a window, there are blocks for what it holds at a time.
        """
        blocks = self.blocks
        cached = request.find_cached(blocks)
        computed, until = len(cached) * blocks.block_size, len(request.tokens)
        if blocks.window is not None:
            until = min(until, max(computed, blocks.window) + self.max_num_batched_tokens)
        freed = blocks.unseen(computed)
        shared = cached[:1] + cached[1 + freed :]
        new = blocks.blocks_for(until) - len(cached)
        kept = blocks.kept_beside(shared)
        if not blocks.can_allocate(new + kept, shared):
            # Pins give way if it would otherwise wait for them, and not for requests that end.
            if not kept or (self.running and len(shared) + new + kept <= blocks.num_blocks):
                return False
            if not blocks.can_allocate(new, shared):
                return False
        table = blocks.allocate(new, shared)
        request.blocks, request.freed = table[:1] * (1 + freed) + table[1:], freed
        request.committed, request.computed = len(cached), computed
        request.started = len(request.tokens)
        request.is_plain = _is_plain(request)
        self.queues.remove(request)
        request.status = Status.RUNNING
        self.running[request.seq] = request
        if request.adapter is not None:
            request.adapter.running += 1
            request.adapter.last_tenant = request.options.tenant
        resumed = request.admitted is not None
        if not resumed:
            request.admitted = now
            request.cached_tokens = min(request.computed, request.prompt_len)
        blocks.use(request.hashes[: len(cached)], now)
        if request.pins:
            pin_reached(request, blocks, now)
        self._emit(
            events.RequestAdmitted(
                time=now,
                request_id=request.id,
                adapter=label_of(request),
                slot=None if request.adapter is None else request.adapter.slot,
                cached_tokens=request.computed if resumed else request.cached_tokens,
                queue_seconds=now - request.arrival,
                resumed=resumed,
            )
        )
        self._tell("request_admitted", now, request=request)
        return True

    def _grow(self, request: Request, tokens: int, now: float) -> bool:
        """Give a running request blocks for ``tokens``; returns False if the request itself was preempted.

        While no blocks are free, the latest arrival of the tenant with the most blocks is preempted.
        """
        new = self.blocks.blocks_for(tokens) - len(request.blocks)
        while new > 0 and not self.blocks.can_allocate(new):
            youngest = max(self._of_who_has_most(), key=lambda r: r.seq)
            self.preempt(youngest, now)
            if youngest is request:
                return False
        if new > 0:
            request.blocks += self.blocks.allocate(new)
        return True

    def _of_who_has_most(self) -> list[Request]:
        """Return the running requests of the tenant that holds the most blocks."""
        by_tenant: dict[str | None, list[Request]] = {}
        for request in self.running.values():
            by_tenant.setdefault(request.options.tenant, []).append(request)
        return max(by_tenant.values(), key=lambda requests: sum(len(r.blocks) - r.freed for r in requests))

    def preempt(self, request: Request, now: float) -> None:
        """Move a request from RUNNING to WAITING. Its KV blocks are freed (full blocks stay in the prefix
        cache), its output stays."""
        self.preemptions += 1
        del self.running[request.seq]
        self.release(request)
        request.status = Status.WAITING
        self.queues.put_back(request)
        self._emit(events.RequestPreempted(time=now, request_id=request.id, adapter=label_of(request)))
        self._tell("request_preempted", now, request=request)

    def advance(self, request: Request, tokens: int) -> None:
        """Count ``tokens`` as computed, and enter newly completed blocks in the prefix cache. If several
        steps computed them, the blocks of those after the first are taken now."""
        request.computed += tokens
        blocks = self.blocks
        if request.computed > len(request.blocks) * blocks.block_size:
            request.blocks += blocks.allocate(blocks.blocks_for(request.computed) - len(request.blocks))
        if not blocks.prefix_caching or request.computed < (request.committed + 1) * blocks.block_size:
            return
        if not request.caches:
            return
        full = request.computed // blocks.block_size
        if full > len(request.hashes):
            request.hash_blocks(self.blocks)
        for index in range(request.committed, full):
            self.blocks.commit(request.blocks[index], request.hashes[index])
        request.committed = full
        if request.pins:
            pin_reached(request, blocks, self._now)

    def release(self, request: Request) -> None:
        """Give back the request's blocks and its claim on the slot."""
        self.blocks.release(request.held)
        request.blocks, request.freed, request.row = [], 0, None
        request.committed = request.computed = 0
        if request.adapter is not None:
            request.adapter.running -= 1


def _decode_part(request: Request) -> _Part:
    if not request.is_plain or request.remaining != 1:
        return _part(request, request.remaining)
    row = request.row
    if row is None:
        part = _part(request, 1)
        request.row = part[2]
        return part
    row.start = start = request.computed
    row.tokens = request.tokens[start:]
    return row.slot, request, row


def _part(request: Request, tokens: int, draft: Sequence[int] = ()) -> _Part:
    start, known = request.computed, request.tokens
    until, slot = start + tokens, request.slot_at(start)
    score = 0
    if request.prompt_logprobs is not None and request.unscored:
        score = max(0, min(tokens, request.prompt_len - 1 - start))
    work = SequenceWork(
        request.id,
        slot,
        [*known[start:until], *draft] if draft else known[start:until],
        start,
        request.blocks,
        until == len(known),  # sample
        request.params,
        request.seed,
        known,  # history
        request.prompt_len,
        score,
        draft,
        request.scale,
    )
    return slot, request, work


def _is_plain(request: Request) -> bool:
    """Whether each step after its prompt gives a request, whose adapter is in its slot, one token, and only
    that."""
    entry, params = request.adapter, request.params
    return (
        params.pooling is None
        and params.constraint is None
        and request.prompt_logprobs is None
        and (entry is None or not entry.invocation)
    )


def _later(work: StepWork | None) -> StepWork | None:
    """Return the quantities of the same decodes, a token later."""
    return None if work is None else work._replace(decode_pairs=work.decode_pairs + work.tokens)
