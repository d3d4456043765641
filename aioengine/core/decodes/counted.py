"""CountedDecodes: running requests whose decodes are counted, for a device whose tokens are known beforehand.

A plain decode adds a token to its request and changes nothing else. In simulation all of these tokens are
equal, and the device knows how long each output will be. So nothing has to be done for such a request at each
step, but only when it needs a block, and when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

from aioengine.core.blocks import BlockManager
from aioengine.core.state import Request, Status
from aioengine.step import CountedRows, Sampled

_Due = list[tuple[int, int, int, Request]]
"""Heap of: a step, the request's ``seq``, its number as it joined, and the request."""


class CountedDecodes:
    """The requests whose decodes are counted, but for the last one of each. The cost of a step does not grow
    with their number.

    Steps are numbered from 0 on; those numbers begin anew when all requests have left.

    Args:
        token: Token that each of them gets in each step.
        final: Returns the number of tokens, prompt included, with which a request ends.
    """

    def __init__(self, blocks: BlockManager, token: Sampled, final: Callable[[Request], int]) -> None:
        self.ends: list[float] = []
        """The end of each step."""
        self.in_flight = False
        """Whether a step with them is in flight."""
        self.wanted = True
        """Whether requests may join. If not, all leave before the next step."""
        self._blocks = blocks
        self._token = token.token
        self._final = final
        self._gaps: list[float] = []
        """Seconds from the end of the step before to that of each step."""
        self._requests: dict[int, Request] = {}
        self._joined = 0
        self._positions = 0
        """Sum of the positions that they read in the next step."""
        self._by_slot: dict[int, dict[int, int]] = {}
        """By slot: for each request in it (its ``seq``), the step that has no token left for it to make."""
        self._longest: dict[int, int] = {}
        """The last of these steps of each slot."""
        self._slots: tuple[tuple[int, int], ...] | None = None
        """The slots and their numbers of requests, sorted; None: to be made."""
        self._last: _Due = []
        """The last step of each."""
        self.blocks: list[int] = []
        """Blocks that they have needed since they joined. A request gets its own when it leaves: nobody reads
        them before."""
        self._needing = [0] * blocks.block_size
        """Numbers of those that need a block for a step, by the step's number modulo the block size."""
        self._given = 0
        """The last step for which those that need a block have one."""
        self._ending: list[Request] = []
        """Those that end in the step in flight."""

    def __len__(self) -> int:
        return len(self._requests)

    # Steps

    def begin(self, others: int) -> None:
        """Prepare the step that is to be formed: those that need a block for it get one. If blocks might not
        suffice for these and ``others``, all leave."""
        if not self.wanted:
            self.leave_all()
        step = len(self.ends)
        count = self._needed(step)
        if count and self._blocks.num_free < count + others:
            self.leave_all()
        else:
            self._take(count, step)

    def join(self, decodes: Iterable[Request]) -> list[Request]:
        """Take in those of ``decodes`` that do nothing else, from the step on that is being formed. Returns
        the others."""
        if not self.wanted:
            return list(decodes)
        others: list[Request] = []
        step, size = len(self.ends), self._blocks.block_size
        for request in decodes:
            known = len(request.tokens)
            spare = len(request.blocks) * size - known
            if not _is_plain(request) or spare >= size or (left := self._final(request) - known) < 2:
                others.append(request)
                continue
            self._joined += 1
            request.counted, request.since, request.joined = self, step, self._joined
            self._requests[request.seq] = request
            self._positions += known
            slot = _slot_of(request)
            end = step + request.params.max_tokens + request.prompt_len - known
            self._by_slot.setdefault(slot, {})[request.seq] = end
            if end > self._longest.get(slot, -1):
                self._longest[slot] = end
            self._slots = None
            heappush(self._last, (step + left - 1, request.seq, self._joined, request))
            self._needing[(step + spare + 1) % size] += 1
        return others

    def ending(self, *, alone: bool) -> Sequence[Request]:
        """Return those that end in the step that is being formed. They have left, unless that step is theirs
        ``alone``."""
        self._ending = self._due(self._last, len(self.ends))
        if alone:
            return ()
        ending, self._ending = self._ending, []
        for request in ending:
            self.leave(request)
        return ending

    def take_ending(self) -> list[Request]:
        """Return those that end in the step that has ended, which is not counted yet. They have left."""
        ending = [request for request in self._ending if request.counted is not None]
        ending += self._due(self._last, len(self.ends))
        self._ending = []
        for request in ending:
            self.leave(request)
        return ending

    def rows(self) -> CountedRows | None:
        """Return what a device has to know of them for the next step; None if there are none."""
        if not self._requests:
            return None
        if self._slots is None:
            self._slots = tuple(sorted([(slot, len(own)) for slot, own in self._by_slot.items()]))
        return CountedRows(len(self._requests), self._positions, self._slots)

    def are(self, rows: CountedRows | None) -> bool:
        """Whether they are still those of ``rows``."""
        return not self._requests if rows is None else rows.slots is self._slots

    def ended(self, ends: Sequence[float], *, begun: int) -> None:
        """Count steps that ended at these times. ``begun``: number of steps that have begun, which is as many
        as have ended, or one more."""
        if not self._requests:
            return
        first = len(self.ends)
        before = self.ends[-1] if self.ends else ends[0]
        for end in ends:
            self._gaps.append(end - before)
            before = end
        self.ends += ends
        self._positions += len(self._requests) * len(ends)
        self.allocate(first + begun - 1)

    def allocate(self, step: int | None = None) -> None:
        """Take the blocks that they need until this step (None: the next one). So many are free."""
        step = len(self.ends) if step is None else step
        self._take(self._needed(step), step)

    @property
    def steps_left(self) -> int:
        """Number of steps, with the one in flight, in which no request ends."""
        return 0 if self._ending else self._next(self._last) - len(self.ends)

    @property
    def until_block(self) -> int:
        """Number of steps, the one in flight included, until one of them needs a block."""
        step, size = self._given + 1, self._blocks.block_size
        while not self._needing[step % size]:
            step += 1
        return step - len(self.ends)

    def blocks_for(self, steps: int) -> int:
        """Return a bound on the blocks that so many steps take."""
        return len(self._requests) * (steps // self._blocks.block_size + 1)

    def left(self) -> dict[int | None, int]:
        """Return, by slot, the most tokens that one of its requests may still make."""
        ended = len(self.ends)
        return {slot: end - ended for slot, end in self._longest.items()}

    def taken(self, request: Request) -> int:
        """Count the blocks that a request has needed since it joined."""
        size = self._blocks.block_size
        first = request.since + len(request.blocks) * size - len(request.tokens) + 1
        return max(0, (self._given - first) // size + 1)

    def _needed(self, step: int) -> int:
        """Count the blocks that are needed until this step."""
        size = self._blocks.block_size
        return sum([self._needing[at % size] for at in range(self._given + 1, step + 1)])

    def _take(self, count: int, step: int) -> None:
        if count:
            self.blocks += self._blocks.allocate(count)
        if step > self._given:
            self._given = step

    @staticmethod
    def _due(heap: _Due, step: int) -> list[Request]:
        """Take out the requests that are due by ``step``."""
        found = []
        while heap and heap[0][0] <= step:
            _, _, joined, request = heappop(heap)
            if request.joined == joined:  # else it has left
                found.append(request)
        return found

    @staticmethod
    def _next(heap: _Due) -> int:
        """Return the step of the first that is due."""
        while heap[0][3].joined != heap[0][2]:
            heappop(heap)
        return heap[0][0]

    # Requests

    def write_down(self, request: Request) -> None:
        """Bring a request up to date with the steps that were counted for it."""
        since, last = request.since, request.last_token
        count = len(self.ends) - since
        if not count or last is None:
            return
        gap = max(self.ends[since] - last, max(self._gaps[since + 1 :], default=0.0))
        if request.worst_gap is None or gap > request.worst_gap:
            request.worst_gap = gap
        request.tokens += [self._token] * count
        request.computed += count
        request.last_token = self.ends[-1]
        request.since = len(self.ends)

    def leave(self, request: Request) -> None:
        """Write down what was counted for a request, and count no more."""
        size, taken = self._blocks.block_size, self.taken(request)
        self._needing[(request.since + len(request.blocks) * size - len(request.tokens) + 1) % size] -= 1
        if taken:
            request.blocks += self.blocks[-taken:]
            del self.blocks[-taken:]
        self.write_down(request)
        del self._requests[request.seq]
        self._positions -= len(request.tokens)
        slot = _slot_of(request)
        own = self._by_slot[slot]
        end = own.pop(request.seq)
        if not own:
            del self._by_slot[slot], self._longest[slot]
        elif end == self._longest[slot]:
            self._longest[slot] = max(own.values())
        self._slots = None
        request.counted, request.joined = None, 0
        if not self._requests:
            self.ends, self._gaps, self._last, self._given = [], [], [], 0

    def leave_all(self) -> None:
        """Write everything down; no step may be in flight, unless it is lost."""
        for request in list(self._requests.values()):
            self.leave(request)

    def check(self, running: Iterable[Request]) -> None:
        """Assert that all counts agree."""
        counted = [request for request in running if request.counted is not None]
        assert {request.seq for request in counted} == self._requests.keys()
        assert all(request.status is Status.RUNNING for request in counted)
        assert self._positions == sum(request.prompt_len + request.output_tokens for request in counted)
        assert len(self.blocks) == sum(map(self.taken, counted))
        assert sum(self._needing) == len(counted)
        assert self._longest == {slot: max(own.values()) for slot, own in self._by_slot.items()}


def _is_plain(request: Request) -> bool:
    """Whether a request that decodes does nothing else in a step, and nobody looks at its tokens."""
    sink, entry = request.sink, request.adapter
    return (
        sink is not None
        and sink.takes_many
        and request.last_token is not None
        and len(request.tokens) - request.computed == 1
        and request.params.pooling is None
        and request.prompt_logprobs is None
        and (entry is None or (entry.slot is not None and not entry.invocation))
    )


def _slot_of(request: Request) -> int:
    entry = request.adapter
    return -1 if entry is None or entry.slot is None else entry.slot
