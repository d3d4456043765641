"""Forms batches: which requests run, over how many tokens, in which KV blocks. The three depend on each
other: a request runs only where it finds blocks, and gets as many tokens as these hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from aioengine import events
from aioengine.core.blocks import BlockManager
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.pacing import Allowance, Floor, Pacer, StepWork
from aioengine.core.queues import RequestQueues
from aioengine.core.speculation import Drafting, propose
from aioengine.core.state import Request, Status
from aioengine.schedulers.policy import Location
from aioengine.step import SequenceWork, StepBatch

FIXED_TOKENS = 16.0
"""First guess of a step's fixed cost, in tokens."""
WORTH_WAITING = 64
"""Tokens that a request has to be able to share with one under way, so that it waits for them."""
_row = attrgetter("row")
_slot = attrgetter("row.slot")
_remaining = attrgetter("remaining")


class StepContents(NamedTuple):
    """Numbers that describe a step; as in :class:`~aioengine.events.StepFinished`."""

    sequences: int = 0
    adapters: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    slots: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[SequenceWork], others: Sequence[SequenceWork]) -> StepContents:
        """Describe ``rows``, of which all but ``others`` are plain decodes."""
        used = tuple(sorted({work.slot for work in rows} - {-1}))
        prefill, decode = 0, len(rows) - len(others)
        for work in others:
            count = len(work.tokens)
            if work.start >= work.prompt_len and count == 1 + len(work.draft):
                decode += count
            else:
                prefill += count
        return cls(len(rows), len(used), prefill, decode, used)


class Batcher:
    """The running requests and their KV blocks."""

    def __init__(
        self,
        blocks: BlockManager,
        queues: RequestQueues,
        guard: PolicyGuard,
        limits: CoreLimits,
        pacer: Pacer | None,
    ) -> None:
        self.blocks = blocks
        self.queues = queues
        self.limits = limits
        self.pacer = pacer
        """None if the time of a step is not bounded."""
        self.speculates = limits.speculation != "none"
        self.running: dict[int, Request] = {}
        """The running requests by ``seq``, in order of admission."""
        self.preemptions = 0
        self.formed: list[Request] = []
        """The requests of the batch that was formed last, in the order of their sequences."""
        self.sequences: list[SequenceWork] = []
        """Their shares of it."""
        self.contents = StepContents()
        """What is in it."""
        self._decodes: list[Request] = []
        """Its requests in order of admission, if these are all running ones, and each step gives each of them
        one token, and only that; else none."""
        self._work: StepWork | None = None
        """The quantities of its last repetition, if these are known."""
        self._now = 0.0
        """Time of the step that is formed, or in flight."""
        self._guard = guard

    def certain_steps(self) -> int:
        """Return the number of steps with the sequences of the last batch that are certain, unless something
        happens: no request ends before the last one, there are blocks for all, and nobody reads tokens
        before."""
        if not self._decodes or self.speculates:
            return 1
        blocks, most = self.blocks, [request.most_tokens - len(request.tokens) for request in self._decodes]
        if not all(request.sink is None or request.sink.waits_for_end for request in self._decodes):
            return 1
        return min(*most, 1 + blocks.num_free // len(most) * blocks.block_size)

    def form(self, admit: Sequence[Request], now: float, slot_ranks: Sequence[int] = ()) -> bool:
        """Form a batch: a token for each running request that decodes, then chunks of prompts of running
        requests and of those in ``admit``, in the policy's order; sorted by slot. Returns whether the
        sequences are those of the batch before, each of which decodes one token."""
        self._now, before = now, self.preemptions
        running, size = self.running.values(), self.blocks.block_size
        decodes = [request for request in running if request.decodes or not request.has_prompt_left]
        growing = [r for r in decodes if r.computed % size == 0 or not r.decodes]  # others need no block
        prefills = deque[Request]()
        if len(decodes) < len(running):
            prefills += [request for request in running if not request.decodes and request.has_prompt_left]
        elif not admit and decodes == self._decodes and self._repeats(growing, slot_ranks):
            return True
        for request in growing:  # it may preempt another one of them, or itself
            if request.status is Status.RUNNING:
                self._has_blocks(request, request.remaining)
        if self.preemptions > before:  # short of blocks
            decodes, admit = [request for request in decodes if request.status is Status.RUNNING], ()
        others = [request for request in decodes if not request.decodes]
        for request in others:
            _fill(request, 1)
        room = self.limits.max_num_batched_tokens - len(decodes)
        room -= self._add_forced([r for r in others if r.remaining > 1], decodes, room, slot_ranks)
        if self.speculates:
            room -= self._draft(decodes, room, slot_ranks)
        work = self._add_prompts(prefills, admit, decodes, room, slot_ranks)
        if self.preemptions > before:  # a request in ``work`` may have lost its blocks to a later one
            work = [request for request in work if request.status is Status.RUNNING]
        work.sort(key=_slot)
        self.formed, self.sequences = work, list(map(_row, work))
        mixed = [request.row for request in work if request.row and not request.decodes]
        self.contents = StepContents.of(self.sequences, mixed)
        # A request that resumes with one token is no decode of the list yet.
        whole = not mixed and len(work) == len(decodes) == len(running)
        self._decodes = decodes if whole else []
        self._work = None
        return False

    def _add_prompts(
        self,
        prefills: deque[Request],
        admit: Sequence[Request],
        decodes: Sequence[Request],
        room: int,
        slot_ranks: Sequence[int],
    ) -> list[Request]:
        """Return the decodes and the requests with chunks of prompts beside them.

        Without a pacer the running ones' chunks come first, in order of admission. With one, half of the
        tokens go to the oldest, so that it always advances; the rest go to the requests with the fewest
        tokens left, so that a short prompt does not wait for long ones. The oldest, the shortest and the
        first newcomer get a chunk, however little time there is, and so do further short ones and newcomers
        that need no more than a chunk together. A newcomer waits if one before it computes what it can share.
        """
        work, allowance = list(decodes), Allowance(room)
        oldest, prompts = None, list(prefills)
        if self.pacer is not None and (prefills or admit):
            allowance = self.pacer.allowance(StepWork.of(map(_row, work), slot_ranks), room)
            if prefills:
                oldest = prefills.popleft()
                allowance.hold(oldest)
                prefills = deque(sorted(prefills, key=_remaining))
        short, new = Floor(), Floor()
        for request in admit:
            if (reason := self._why_not(request)) is not None:
                self._guard.refuse(reason, request.id)
                continue
            while prefills and (oldest is None or prefills[0].remaining <= request.remaining):
                self._compute(prefills.popleft(), allowance, short, work)
            if prompts and _is_under_way(request, prompts):
                continue
            # Stop at the first that does not fit: it would starve if smaller ones passed it.
            if not allowance.has_room(request, new) or not self._start(request):
                break
            prompts.append(request)
            self._compute(request, allowance, new, work)
        for request in prefills:
            self._compute(request, allowance, short, work)
        if oldest is not None:
            allowance.give_back()
            self._compute(oldest, allowance, Floor(), work)
        return work

    def _repeats(self, growing: Sequence[Request], slot_ranks: Sequence[int]) -> bool:
        """Whether the requests of the batch before can run again, a token later. Then those of ``growing``
        that need a block have got it."""
        size = self.blocks.block_size
        growing = [request for request in growing if request.computed == len(request.blocks) * size]
        if self.speculates or not self._decodes or not self.blocks.can_allocate(len(growing)):
            return False
        if self.pacer is not None:
            if self._work is None:
                self._work = StepWork.of(self.sequences, slot_ranks)
            else:
                pairs = self._work.decode_pairs + self._work.tokens
                self._work = self._work._replace(decode_pairs=pairs)
        for request in growing:
            request.blocks += self.blocks.allocate(1)
        return True

    def work_of(self, batch: StepBatch) -> StepWork:
        """Return the quantities of a batch, the one that was formed last."""
        if not batch.again or self._work is None:
            return StepWork.of(batch.sequences, batch.slot_ranks)
        return self._work

    def _add_forced(
        self, forced: Sequence[Request], decodes: Sequence[Request], room: int, slot_ranks: Sequence[int]
    ) -> int:
        """Let requests with several known tokens compute more of them than one. Returns how many more. Each
        computes at least one, as all ``decodes`` do. What the room and the step's time allow beyond that goes
        to those with the fewest first."""
        if not forced:
            return 0
        allowance = Allowance(room)
        if self.pacer is not None:
            allowance = self.pacer.allowance_of_decodes(StepWork.of(map(_row, decodes), slot_ranks), room)
        taken = 0
        for request in sorted(forced, key=_remaining):
            more = allowance.take(request, request.remaining - 1)
            _fill(request, 1 + more)
            taken += more
        return taken

    def _draft(self, decodes: Sequence[Request], room: int, slot_ranks: Sequence[int]) -> int:
        """Propose tokens to the requests that compute their last known one. It preempts no request, and
        leaves half of the room to prompts. Returns the number of tokens proposed."""
        able = [request for request in decodes if request.row is not None and request.row.sample]
        limits = [self._draft_limit(request) for request in able]
        fixed, room = FIXED_TOKENS, room // 2
        if self.pacer is not None and able:
            each = StepWork.of(map(_row, able), slot_ranks)
            fixed, room = self.pacer.fixed_tokens(each), min(room, self.pacer.drafts(each))
        taken = 0
        draftings = [request.drafting or Drafting() for request in able]
        drafts = propose(draftings, [request.tokens for request in able], limits, fixed, room)
        for request, drafting, draft in zip(able, draftings, drafts, strict=True):
            request.drafting = drafting
            if draft and self._has_blocks(request, request.remaining + len(draft), only_free=True):
                _fill(request, request.remaining, draft)
                taken += len(draft)
        return taken

    def _draft_limit(self, request: Request) -> int:
        """Return how many tokens may be proposed to a request. A step chooses one more than that."""
        params = request.params
        if request.unscored or (params.constraint is not None and not self.limits.draft_constrained):
            return 0
        left = self.limits.max_model_len - len(request.tokens)
        return min(params.max_tokens - request.output_tokens, left) - 1

    def _compute(self, request: Request, allowance: Allowance, floor: Floor, work: list[Request]) -> None:
        """Add a chunk of the request's prompt, if the budget allows one."""
        if request.status is Status.RUNNING:
            tokens = allowance.take(request, request.next_piece, floor)
            if tokens > 0 and self._has_blocks(request, tokens):
                _fill(request, tokens)
                work.append(request)

    def _has_blocks(self, request: Request, tokens: int, *, only_free: bool = False) -> bool:
        """Give a running request blocks for this many more tokens. Returns False if it has none, because it
        was preempted: while no blocks are free, the latest arrival of the tenant with the most blocks is.
        With ``only_free`` nobody is."""
        new = self.blocks.blocks_for(request.computed + tokens) - len(request.blocks)
        if new <= 0:
            return True
        if only_free and not self.blocks.can_allocate(new):
            return False
        while not self.blocks.can_allocate(new):
            youngest = max(self._of_who_has_most(), key=lambda r: r.seq)
            self.preempt(youngest, self._now)
            if youngest is request:
                return False
        request.blocks += self.blocks.allocate(new)
        return True

    def _why_not(self, request: Request) -> str | None:
        """Return the reason if a request may not be admitted now."""
        if request.status is not Status.WAITING:
            return "admit_not_waiting"
        if request.adapter is not None and request.adapter.location is not Location.SLOT:
            return "admit_adapter_not_ready"
        return "admit_over_max_num_seqs" if len(self.running) >= self.limits.max_num_seqs else None

    def _start(self, request: Request) -> bool:
        """Move a request from WAITING to RUNNING with blocks for all its known tokens, as many as possible
        from the prefix cache."""
        blocks, now = self.blocks, self._now
        cached = request.find_cached()
        new = blocks.blocks_for(len(request.tokens)) - len(cached)
        if not blocks.can_allocate(new, cached):
            return False
        request.blocks = blocks.allocate(new, cached)
        request.committed, request.computed = len(cached), len(cached) * blocks.block_size
        request.started = len(request.tokens)
        params, entry = request.params, request.adapter
        alone = params.pooling is None and params.constraint is None and request.prompt_logprobs is None
        request.is_plain = alone and (entry is None or not entry.invocation)
        self.queues.remove(request)
        request.status = Status.RUNNING
        self.running[request.seq] = request
        if entry is not None:
            entry.running += 1
            entry.last_tenant = request.options.tenant
        resumed = request.admitted is not None
        if not resumed:
            request.admitted = now
            request.cached_tokens = min(request.computed, request.prompt_len)
        self._guard.note(
            events.RequestAdmitted,
            request,
            now,
            slot=None if entry is None else entry.slot,
            cached_tokens=request.computed if resumed else request.cached_tokens,
            queue_seconds=now - request.arrival,
            resumed=resumed,
        )
        return True

    def _of_who_has_most(self) -> list[Request]:
        """Return the running requests of the tenant that holds the most blocks."""
        by_tenant: dict[str | None, list[Request]] = {}
        for request in self.running.values():
            by_tenant.setdefault(request.options.tenant, []).append(request)
        return max(by_tenant.values(), key=lambda requests: sum(len(r.blocks) for r in requests))

    def preempt(self, request: Request, now: float) -> None:
        """Move a request from RUNNING to WAITING. Its KV blocks are freed (full blocks stay in the prefix
        cache), its output stays."""
        self.preemptions += 1
        del self.running[request.seq]
        self.release(request)
        request.status = Status.WAITING
        self.queues.put_back(request)
        self._guard.note(events.RequestPreempted, request, now)

    def advance(self, request: Request, tokens: int) -> None:
        """Count ``tokens`` as computed, and enter newly completed blocks in the prefix cache. If several
        steps computed them, the blocks of those after the first are taken now."""
        request.computed += tokens
        blocks = self.blocks
        if request.computed > len(request.blocks) * blocks.block_size:
            request.blocks += blocks.allocate(blocks.blocks_for(request.computed) - len(request.blocks))
        full = request.computed // blocks.block_size
        if not blocks.prefix_caching or full <= request.committed or not request.caches:
            return
        if full > len(request.hashes):
            request.hash_blocks(blocks)
        for index in range(request.committed, full):
            blocks.commit(request.blocks[index], request.hashes[index])
        request.committed = full

    def release(self, request: Request) -> None:
        """Give back the request's blocks and its claim on the slot."""
        self.blocks.release(request.blocks)
        request.blocks, request.row, request.decodes = [], None, False
        request.committed = request.computed = 0
        if request.adapter is not None:
            request.adapter.running -= 1


def _fill(request: Request, tokens: int, draft: Sequence[int] = ()) -> None:
    """Make a row of a request's next ``tokens``, and of a draft after these."""
    start, known = request.computed, request.tokens
    until = start + tokens
    sample, score = until == len(known), 0
    if request.unscored:
        score = max(0, min(tokens, request.prompt_len - 1 - start))
    request.row = SequenceWork(
        request.id,
        request.slot_at(start),
        [*known[start:until], *draft],
        start,
        request.blocks,
        sample,
        request.params,
        request.seed,
        known,
        request.prompt_len,
        score,
        draft,
        request.scale,
    )
    decodes = tokens == 1 and sample and not draft and request.last_token is not None
    request.decodes = decodes and request.is_plain


def _is_under_way(request: Request, prompts: Sequence[Request]) -> bool:
    """Whether ``request``, which waits, would compute what one of ``prompts`` computes before it: the next
    tokens of its own that are not in the prefix cache yet. All choices of a request have the same prompt, for
    example. What has no more tokens left comes first in each step, so waiting for it makes no request slower.
    """
    blocks = request.cache
    if not blocks.prefix_caching or not request.caches or request.unscored:
        return False
    before = [other for other in prompts if other.caches and other.remaining <= request.remaining]
    if not before:
        return False
    last = len(request.find_cached()) - (-WORTH_WAITING // blocks.block_size) - 1
    hashes = request.hashes
    return last < len(hashes) and any(
        other.committed <= last < len(other.hashes) and other.hashes[last] == hashes[last] for other in before
    )
