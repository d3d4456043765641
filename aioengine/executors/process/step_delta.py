"""Encodes steps as differences from what the workers already know of each request.

The core's batches are whole: each row has its request's full history and block table. The engine's side
keeps a copy of what it has sent; the workers' side puts the same rows together again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec

from aioengine.executors.process.wire import Masks, Opened, Step, Work
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

_DEFAULTS = msgspec.structs.asdict(SamplingParams())


class _Sent:
    __slots__ = ("blocks", "key", "tokens")

    def __init__(self, key: int) -> None:
        self.key = key
        self.tokens = 0
        """Number of its tokens that were sent."""
        self.blocks: list[int] = []


class StepEncoder:
    """Encoder on the engine's side. An ended request must be forgotten before its id is used again."""

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}
        self._keys = count()
        self._ended: list[int] = []

    def forget(self, request_id: str) -> None:
        """Note that a request has ended; the workers are told with the next step."""
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._ended.append(sent.key)

    def encode(self, batch: StepBatch) -> Step:
        """Encode a step, which then counts as sent. The caller fills in its ``number``."""
        opened: list[Opened] = []
        work = [self._work(row, opened) for row in batch.sequences]
        ended, self._ended = self._ended, []
        return Step(0, batch.step, ended, opened, work, list(batch.slot_ranks))

    def _work(self, row: SequenceWork, opened: list[Opened]) -> Work:
        sent = self._sent.get(row.request_id)
        if sent is None:
            sent = self._sent[row.request_id] = _Sent(next(self._keys))
            opened.append(_opened(sent.key, row))
        tokens = list(row.history[sent.tokens :])
        sent.tokens += len(tokens)
        kept = _same(sent.blocks, row.block_table)
        blocks = list(row.block_table[kept:])
        sent.blocks[kept:] = blocks
        return Work(
            sent.key,
            row.slot,
            row.start,
            len(row.tokens) - len(row.draft),
            row.sample,
            tokens,
            kept,
            blocks,
            row.score,
            list(row.draft),
            row.scale,
        )


def _opened(key: int, row: SequenceWork) -> Opened:
    params = {
        name: value
        for name, value in msgspec.structs.asdict(row.params).items()
        if name != "constraint" and value != _DEFAULTS[name]
    }
    constrained = row.params.constraint is not None
    return Opened(key, row.request_id, params, constrained, row.seed, row.prompt_len)


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
    __slots__ = ("blocks", "constraint", "history", "opened", "params")

    def __init__(self, opened: Opened, masks: SentMasks) -> None:
        self.opened = opened
        self.constraint = SentConstraint(masks) if opened.constrained else None
        fields: dict[str, Any] = {**opened.params, "constraint": self.constraint}
        self.params = SamplingParams(**fields)
        self.history: list[int] = []
        self.blocks: list[int] = []


class StepDecoder:
    """Decoder on a worker's side."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self.masks = SentMasks()

    def __len__(self) -> int:
        """Return the number of requests that are known."""
        return len(self._known)

    def decode(self, step: Step) -> StepBatch:
        for key in step.ended:
            del self._known[key]
        for opened in step.opened:
            self._known[opened.key] = _Known(opened, self.masks)
        for index, work in enumerate(step.work):
            constraint = self._known[work.key].constraint
            if constraint is not None:
                constraint.step, constraint.index = step.step, index
        rows = [self._row(work) for work in step.work]
        return StepBatch(step.step, rows, step.slot_ranks)

    def _row(self, work: Work) -> SequenceWork:
        known = self._known[work.key]
        known.history += work.tokens
        known.blocks[work.kept_blocks :] = work.blocks
        return SequenceWork(
            request_id=known.opened.request_id,
            slot=work.slot,
            tokens=known.history[work.start : work.start + work.count] + work.draft,
            start=work.start,
            block_table=known.blocks,
            sample=work.sample,
            params=known.params,
            seed=known.opened.seed,
            history=known.history,
            prompt_len=known.opened.prompt_len,
            score=work.score,
            draft=work.draft or (),
            scale=work.scale,
        )
