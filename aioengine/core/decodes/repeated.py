"""RepeatedDecodes: decode steps of the same requests, of which only what changes is formed anew."""

from __future__ import annotations

from collections.abc import Sequence

from aioengine.core.blocks import BlockManager
from aioengine.core.decodes.turns import Turns
from aioengine.core.pacing import StepWork
from aioengine.core.state import Request
from aioengine.step import Decodes, SequenceWork, StepBatch


class RepeatedDecodes:
    """The last step, as far as the next one may be the same one token later.

    That is so if all running requests decoded plainly in it, each got a token, none ended, and nothing else
    has happened. Then nothing has to be decided and no row has to be made; some requests need a block.

    Args:
        running: The running requests, in the order in which they get blocks.
    """

    def __init__(self, blocks: BlockManager, running: dict[int, Request], turns: Turns | None) -> None:
        self._blocks = blocks
        self._running = running
        self._turns = turns
        self.requests: list[Request] = []
        """The requests of the rows, in their order."""
        self._batch: StepBatch | None = None
        """The last step; None if the next one does not repeat it."""
        self._changes = -1
        """Number of changes that the core has counted until that step."""
        self._work = StepWork(0)
        """What the first of the repeated steps costs."""
        self._growing: list[list[Request]] = []
        """By number of the step, modulo the size of a block: the requests that begin a block in it."""

    def note(self, batch: StepBatch, requests: list[Request], changes: int) -> None:
        """Note a step whose rows were formed one by one, which decodes with all running requests."""
        self._batch, self.requests, self._changes, self._growing = batch, requests, changes, []

    def spoil(self) -> None:
        """Form the next step anew. Requests that have ended are not held."""
        self._batch, self.requests, self._growing = None, [], []

    def ended(self, changes: int, *, all_decoded: bool) -> None:
        """Note that the step has ended. The next one may repeat it if all its requests decoded in it, and
        nothing else has happened."""
        if changes != self._changes or not all_decoded:
            self.spoil()

    def next(self, changes: int) -> Decodes | None:
        """Return the rows of the next step, and give their requests the blocks for it; None if it is to be
        formed anew."""
        batch = self._batch
        if batch is None or changes != self._changes or len(self.requests) != len(self._running):
            return None
        last = batch.sequences
        if type(last) is Decodes:
            rows = last.next()
        elif all(map(_is_plain, self.requests, last)):
            rows = Decodes(last, 1, batch.contents())
            self._begin(batch)
        else:
            self.spoil()
            return None
        if self._turns is not None and not self._turns.all_fit(self.work(rows)):
            return None
        growing = self._growing[rows.steps % self._blocks.block_size]
        if growing and not self._grow(growing):
            return None
        return rows

    def begun(self, batch: StepBatch) -> None:
        """Note the step that has the rows of ``next``."""
        self._batch = batch

    def work(self, rows: Decodes) -> StepWork:
        """Return what a step with these rows costs."""
        work = self._work
        return work._replace(decode_pairs=work.decode_pairs + work.tokens * rows.steps)

    def _begin(self, batch: StepBatch) -> None:
        size = self._blocks.block_size
        self._work = StepWork.of(batch.sequences, batch.slot_ranks)
        self._growing = [[] for _ in range(size)]
        for request in self._running.values():
            # ``computed`` is the position that the first repetition computes.
            self._growing[(1 - request.computed) % size].append(request)

    def _grow(self, requests: Sequence[Request]) -> bool:
        """Give a block to each of the requests that has none at its position, unless they are too few."""
        size = self._blocks.block_size
        needing = [request for request in requests if request.computed >= len(request.blocks) * size]
        if not self._blocks.can_allocate(len(needing)):
            return False
        for request in needing:
            request.blocks += self._blocks.allocate(1)
        return True


def _is_plain(request: Request, row: SequenceWork) -> bool:
    """Whether a request does nothing but decode in this row, and in the next one as well."""
    entry = request.adapter
    return (
        len(row.tokens) == 1
        and row.sample
        and not row.score
        and not row.draft
        and row.params.pooling is None
        and row.params.constraint is None
        and request.prompt_logprobs is None
        and request.computed + 1 == len(request.tokens)
        and (entry is None or not entry.invocation)
    )
