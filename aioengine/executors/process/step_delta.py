"""Encodes steps as differences from what the workers already know of each request.

The core's batches are whole: each row has its request's full history and block table. The engine's side
remembers what it has sent; the workers' side puts the same rows together again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from aioengine.executors.process.wire import Masks, Opened, Row, Step
from aioengine.request import SamplingParams, pack_params
from aioengine.step import SequenceWork, StepBatch


class StepEncoder:
    """Encoder on the engine's side. An ended request must be forgotten before its id is used again."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[int, list[int]]] = {}
        """Number of a request's tokens that were sent, and its block table as it was sent last."""
        self._ended: list[str] = []

    def forget(self, request_id: str) -> None:
        """Note that a request has ended; the workers are told with the next step."""
        if self._sent.pop(request_id, None) is not None:
            self._ended.append(request_id)

    def encode(self, batch: StepBatch) -> Step:
        """Encode a step, which then counts as sent."""
        ended, self._ended = self._ended, []
        return Step(batch.step, ended, list(map(self._row, batch.sequences)), list(batch.slot_ranks))

    def _row(self, work: SequenceWork) -> Row:
        sent, opened = self._sent.get(work.request_id), None
        if sent is None:
            sent = 0, []
            constrained = work.params.constraint is not None
            opened = Opened(pack_params(work.params), constrained, work.seed, work.prompt_len)
        known, table = sent
        blocks = None if table == work.block_table else list(work.block_table)
        self._sent[work.request_id] = len(work.history), table if blocks is None else blocks
        return Row(
            work.request_id,
            work.slot,
            work.start,
            len(work.tokens) - len(work.draft),
            work.sample,
            list(work.history[known:]),
            blocks,
            work.score,
            list(work.draft),
            work.scale,
            opened,
        )


class SentMasks:
    """Masks of the running step. They arrive after the step itself."""

    def __init__(self) -> None:
        self._latest = Masks(-1, {})
        self._came = threading.Condition()

    def put(self, masks: Masks) -> None:
        with self._came:
            self._latest = masks
            self._came.notify_all()

    def of(self, step: int) -> dict[int, bytes]:
        """Return the masks by index in the step; waits for them."""
        with self._came:
            self._came.wait_for(lambda: self._latest.step == step)
            return self._latest.found


class SentConstraint:
    """Stand-in for a constraint that lives in the engine's process; its masks arrive by message."""

    slow = False

    def __init__(self, masks: SentMasks) -> None:
        self._masks = masks
        self.step = self.index = 0
        """The running step, and the request's index in it."""

    def begin(self, output: Sequence[int]) -> None:
        """Do nothing, because the engine has already begun."""

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        return self._masks.of(self.step).get(self.index)

    def allowed(self, output: Sequence[int]) -> bytes:
        return self.poll(output, 0) or b""


class StepDecoder:
    """Decoder on a worker's side."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Opened, SamplingParams, list[int], list[int]]] = {}
        """What each request was opened with, its parameters, its history and its block table."""
        self.masks = SentMasks()

    def __len__(self) -> int:
        """Return the number of requests that are known."""
        return len(self._known)

    def decode(self, step: Step) -> StepBatch:
        for request_id in step.ended:
            del self._known[request_id]
        work = [self._work(step.step, index, row) for index, row in enumerate(step.rows)]
        return StepBatch(step.step, work, step.slot_ranks)

    def _work(self, step: int, index: int, row: Row) -> SequenceWork:
        if row.opened is not None:
            constraint = SentConstraint(self.masks) if row.opened.constrained else None
            params = SamplingParams(**row.opened.params, constraint=constraint)
            self._known[row.request_id] = row.opened, params, [], []
        opened, params, history, blocks = self._known[row.request_id]
        if isinstance(params.constraint, SentConstraint):
            params.constraint.step, params.constraint.index = step, index
        history += row.tokens
        if row.blocks is not None:
            blocks[:] = row.blocks
        return SequenceWork(
            request_id=row.request_id,
            slot=row.slot,
            tokens=history[row.start : row.start + row.count] + row.draft,
            start=row.start,
            block_table=blocks,
            sample=row.sample,
            params=params,
            seed=opened.seed,
            history=history,
            prompt_len=opened.prompt_len,
            score=row.score,
            draft=row.draft or (),
            scale=row.scale,
        )
