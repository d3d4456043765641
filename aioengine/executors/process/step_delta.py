"""Encodes steps as differences from what the workers already know of each request.

The core's batches are whole: each row has its request's full history and block table. The engine's side
keeps a copy of what it has sent; the workers' side puts the same rows together again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from aioengine.executors.process.wire import Masks, Opened, Row, Step
from aioengine.request import SamplingParams, pack_params
from aioengine.step import SequenceWork, StepBatch


class _Sent:
    """What was sent of a request."""

    __slots__ = ("blocks", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        """Number of its tokens."""
        self.blocks: list[int] = []


class StepEncoder:
    """Encoder on the engine's side. An ended request must be forgotten before its id is used again."""

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}
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
            sent = self._sent[work.request_id] = _Sent()
            constrained = work.params.constraint is not None
            opened = Opened(pack_params(work.params), constrained, work.seed, work.prompt_len)
        tokens = list(work.history[sent.tokens :])
        sent.tokens += len(tokens)
        kept = _same(sent.blocks, work.block_table)
        blocks = list(work.block_table[kept:])
        sent.blocks[kept:] = blocks
        return Row(
            work.request_id,
            work.slot,
            work.start,
            len(work.tokens) - len(work.draft),
            work.sample,
            tokens,
            kept,
            blocks,
            work.score,
            list(work.draft),
            work.scale,
            opened,
        )


def _same(known: list[int], table: Sequence[int]) -> int:
    """Return the length of the common prefix. A table only grows until the request is preempted, or gives
    back blocks behind its window."""
    if known == table:
        return len(known)
    if len(known) < len(table) and table[: len(known)] == known:
        return len(known)
    return next((i for i, (a, b) in enumerate(zip(known, table, strict=False)) if a != b), len(table))


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


class _Known:
    """What a worker knows of a request."""

    __slots__ = ("blocks", "constraint", "history", "opened", "params")

    def __init__(self, opened: Opened, masks: SentMasks) -> None:
        self.opened = opened
        self.constraint = SentConstraint(masks) if opened.constrained else None
        self.params = SamplingParams(**opened.params, constraint=self.constraint)
        self.history: list[int] = []
        self.blocks: list[int] = []


class StepDecoder:
    """Decoder on a worker's side."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
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
            self._known[row.request_id] = _Known(row.opened, self.masks)
        known = self._known[row.request_id]
        if known.constraint is not None:
            known.constraint.step, known.constraint.index = step, index
        known.history += row.tokens
        known.blocks[row.kept_blocks :] = row.blocks
        return SequenceWork(
            request_id=row.request_id,
            slot=row.slot,
            tokens=known.history[row.start : row.start + row.count] + row.draft,
            start=row.start,
            block_table=known.blocks,
            sample=row.sample,
            params=known.params,
            seed=known.opened.seed,
            history=known.history,
            prompt_len=known.opened.prompt_len,
            score=row.score,
            draft=row.draft or (),
            scale=row.scale,
        )
