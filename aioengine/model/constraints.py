"""Masks of a step's constraints: begun before the forward pass, collected after it.

Constraints are code of the application, and a step is everybody's. So whatever a constraint raises or returns
ends its own request at most. (``CancelledError``, which is no ``Exception``, would end the engine loop.)
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from aioengine.checks import error_text
from aioengine.request import StartedConstraint, TokenConstraint
from aioengine.step import OutputView, SequenceWork

PATIENCE_SECONDS = 0.02
"""Seconds that a step waits for all rows together, except rows with slow constraints."""
ALONE_SECONDS = 0.05
"""Seconds that it waits for a slow one if the step has no other rows."""


class Masks(NamedTuple):
    """Masks by index among the rows."""

    found: dict[int, bytes]
    late: set[int]
    failed: dict[int, str]
    """Reason of each failure."""
    forced: dict[int, Sequence[int]]
    """Tokens that must follow the only one that a mask allows, where it is known that there are any."""


def begin(rows: Iterable[SequenceWork]) -> None:
    """Start the constraints of rows that will be sampled, if they can start early. Errors here appear again
    in :func:`collect`."""
    for row in rows:
        if row.params.constraint is None or not row.sample:
            continue
        if (constraint := _started(row)) is not None:
            with contextlib.suppress(BaseException):
                constraint.begin(row.output)


def collect(rows: Sequence[SequenceWork], *, alone: bool, vocab: int) -> Masks:
    """Collect the masks of those of ``rows`` that will be sampled. ``alone``: the step has no other rows.
    ``vocab``: number of logits; forced tokens must be below it."""
    masks = Masks({}, set(), {}, {})
    until = time.monotonic() + PATIENCE_SECONDS
    for index, row in enumerate(rows):
        constraint = row.params.constraint
        if constraint is None or not row.sample:
            continue
        try:
            mask = _ask(row, constraint, until)
            # Log-probabilities need the logits at each place.
            forced = () if mask is None or row.params.logprobs is not None else _forced(constraint, vocab)
        except BaseException as error:
            masks.failed[index] = f"its constraint failed: {error_text(error)}"
            continue
        if mask is None:
            masks.late.add(index)
            continue
        masks.found[index] = mask
        if forced:
            masks.forced[index] = forced
    if alone and rows and len(masks.late) == len(rows) and (first := _started(rows[0])) is not None:
        with contextlib.suppress(BaseException):  # it is asked again in the next step
            first.poll(rows[0].output, ALONE_SECONDS)
    return masks


def _ask(row: SequenceWork, constraint: TokenConstraint, until: float) -> bytes | None:
    output = OutputView(row.history, row.prompt_len, row.draft)
    started = _started(row)
    if started is None:
        return _mask(constraint.allowed(output))
    mask = started.poll(output, 0.0 if started.slow else max(0.0, until - time.monotonic()))
    return None if mask is None else _mask(mask)


def _mask(answer: Any) -> bytes:
    if isinstance(answer, int):  # for which bytes() makes so many zeros
        raise TypeError(f"it returned {answer!r}, not bytes")
    return bytes(answer)


def _forced(constraint: TokenConstraint, vocab: int) -> tuple[int, ...]:
    forced = tuple(map(operator.index, getattr(constraint, "forced", ())))
    if not all(0 <= token < vocab for token in forced):
        raise ValueError(f"its forced tokens {forced!r} are not all token ids below {vocab}")
    return forced


def _started(row: SequenceWork) -> StartedConstraint | None:
    constraint = row.params.constraint
    # Not isinstance: with a protocol that takes longer than the rest.
    return cast(StartedConstraint, constraint) if hasattr(constraint, "begin") else None
