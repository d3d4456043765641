"""Sampling after each proposed token, as long as the tokens before it are what was sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import accumulate

from torch import Tensor

from aioengine.step import Sampled, SequenceWork

Sample = Callable[[Tensor, Sequence[SequenceWork]], list[Sampled]]


def sample_drafted(
    logits: Tensor, works: Sequence[SequenceWork], sample: Sample
) -> Sequence[Sequence[Sampled]]:
    """Return the tokens of each sequence, at least one.

    Rows without a constraint are sampled all at once. A constraint is asked again only when a proposed token
    was right: what it allows next depends on it, and it follows the output from token to token.

    Args:
        logits: [N, vocab]; for each sequence one row, and one for each token of its ``draft``.
        sample: Called with rows of ``logits`` and what they follow: sequences whose ``draft`` is only what
            stands before the row's token.
    """
    begins = list(accumulate((1 + len(work.draft) for work in works), initial=0))
    rows: list[tuple[int, int]] = []
    """(sequence, how much of its draft stands before it)"""
    for i, work in enumerate(works):
        free = work.params.constraint is None
        rows += [(i, depth) for depth in range(1 + len(work.draft) * free)]
    found: list[list[Sampled]] = [[] for _ in works]
    while rows:
        places = [begins[i] + depth for i, depth in rows]
        some = logits if len(places) == len(logits) else logits[places]
        sequences = [dataclasses.replace(works[i], draft=works[i].draft[:depth]) for i, depth in rows]
        for (i, _), token in zip(rows, sample(some, sequences), strict=True):
            found[i].append(token)
        waiting = [i for i, tokens in enumerate(found) if len(tokens) < 1 + len(works[i].draft)]
        rows = [(i, len(found[i])) for i in waiting if _right(works[i], found[i]) == len(found[i])]
    answers = [tokens[: 1 + _right(work, tokens)] for work, tokens in zip(works, found, strict=True)]
    for tokens in answers:
        if len(tokens) > 1 and tokens[-1].late:
            tokens.pop()  # its constraint is asked again in the next step
    return answers


def _right(work: SequenceWork, tokens: Sequence[Sampled]) -> int:
    """Return how many of ``work.draft`` ``tokens`` agree with, from the first on."""
    right = 0
    for proposed, token in zip(work.draft, tokens, strict=False):
        if token.token != proposed or token.late or token.error is not None:
            break
        right += 1
    return right
