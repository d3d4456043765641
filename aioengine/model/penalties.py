"""Repetition, presence and frequency penalties.

The tokens of each request are kept from step to step, so the cost of a step depends on its new tokens and not
on the length of the history, and only the scores of tokens that were seen are touched.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from aioengine.kernels.transfer import send
from aioengine.step import SequenceWork


class SeenTokens:
    """The distinct tokens of one request's prompt and output, and how often each is in the output."""

    def __init__(self, history: Sequence[int]) -> None:
        self.history = history
        self.ids, self.counts = array("q"), array("f")
        self._places: dict[int, int] = {}
        self._known = 0

    def update(self, prompt_len: int) -> None:
        """Take in what has been added to the history."""
        for position, token in enumerate(self.history[self._known :], self._known):
            self.see(token, is_output=position >= prompt_len)
        self._known = len(self.history)

    def see(self, token: int, *, is_output: bool) -> None:
        """Take in one token."""
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.counts.append(0.0)
        self.counts[place] += is_output

    def followed_by(self, draft: Sequence[int]) -> SeenTokens:
        """Return a copy that has seen these in the output as well."""
        copy = SeenTokens(self.history)
        copy.ids, copy.counts, copy._places = self.ids[:], self.counts[:], dict(self._places)
        for token in draft:
            copy.see(token, is_output=True)
        return copy


class Penalties:
    """Applies the penalties of the rows of successive steps."""

    def __init__(self) -> None:
        self._seen: dict[str, SeenTokens] = {}
        """Counts of the requests of the last step that had penalties, by request id."""

    def apply(self, scores: Tensor, rows: Sequence[SequenceWork]) -> None:
        """Penalise ``scores`` [N, vocab], float32, in place."""
        before, self._seen = self._seen, {}
        active: list[tuple[int, SequenceWork, SeenTokens]] = []
        for i, row in enumerate(rows):
            if row.params.has_penalties:
                seen = self._seen.get(row.request_id) or before.get(row.request_id)
                if seen is None or seen.history is not row.history:  # another request of that id
                    seen = SeenTokens(row.history)
                seen.update(row.prompt_len)
                self._seen[row.request_id] = seen
                active.append((i, row, seen.followed_by(row.draft) if row.draft else seen))
        if not active:
            return
        vocab, sizes = scores.shape[1], torch.tensor([len(seen.ids) for _, _, seen in active])

        def per_row(field: str) -> Tensor:
            values = [getattr(row.params, field) for _, row, _ in active]
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(sizes)

        cells = torch.cat([_tensor(seen.ids, torch.int64) + i * vocab for i, _, seen in active])
        counts = torch.cat([_tensor(seen.counts, torch.float32) for _, _, seen in active])
        less = per_row("frequency_penalty") * counts + per_row("presence_penalty") * (counts > 0)
        cells, penalty, less = send([cells, per_row("repetition_penalty"), less], scores.device)
        flat = scores.view(-1)
        value = flat[cells]
        flat[cells] = torch.where(value > 0, value / penalty, value * penalty) - less
        scores.clamp_(max=torch.finfo(scores.dtype).max)  # a tiny repetition penalty overflows; -inf stays


def _tensor(values: array[int] | array[float], dtype: torch.dtype) -> Tensor:
    """Return a view, which must be gone before the array grows."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
