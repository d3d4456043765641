"""Repetition, presence and frequency penalties.

The tokens of each request are kept from step to step, so the cost of a step depends on its new tokens and not
on the length of the history.
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
        self.ids = array("q")
        self.output_ids = array("q")
        self.counts = array("f")
        """Number of occurrences of each of ``output_ids``."""
        self._seen: set[int] = set()
        self._places: dict[int, int] = {}
        self._known = 0

    def update(self, prompt_len: int) -> None:
        """Take in what has been added to the history."""
        for position in range(self._known, len(self.history)):
            self._see(self.history[position], is_output=position >= prompt_len)
        self._known = len(self.history)

    def followed_by(self, draft: Sequence[int]) -> SeenTokens:
        """A copy that has seen these in the output as well."""
        copy = SeenTokens(self.history)
        copy.ids, copy.output_ids, copy.counts = self.ids[:], self.output_ids[:], self.counts[:]
        copy._seen, copy._places, copy._known = set(self._seen), dict(self._places), self._known
        for token in draft:
            copy._see(token, is_output=True)
        return copy

    def _see(self, token: int, *, is_output: bool) -> None:
        if token not in self._seen:
            self._seen.add(token)
            self.ids.append(token)
        if is_output:
            place = self._places.setdefault(token, len(self.output_ids))
            if place == len(self.output_ids):
                self.output_ids.append(token)
                self.counts.append(0.0)
            self.counts[place] += 1.0


class Penalties:
    """Applies the penalties of the rows of successive steps."""

    def __init__(self) -> None:
        self._seen: dict[str, SeenTokens] = {}
        """Counts of the last step's requests, by request id."""

    def apply(self, scores: Tensor, rows: Sequence[SequenceWork]) -> None:
        """Penalise ``scores`` [N, vocab], float32, in place, touching only the tokens that were seen."""
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
        vocab = scores.shape[1]
        sizes = torch.tensor([len(seen.ids) for _, _, seen in active])
        output_sizes = torch.tensor([len(seen.output_ids) for _, _, seen in active])

        def per_row(field: str, sizes: Tensor) -> Tensor:
            values = [getattr(row.params, field) for _, row, _ in active]
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(sizes)

        cells = torch.cat([_tensor(seen.ids, torch.int64) + i * vocab for i, _, seen in active])
        outputs = torch.cat([_tensor(seen.output_ids, torch.int64) + i * vocab for i, _, seen in active])
        counts = torch.cat([_tensor(seen.counts, torch.float32) for _, _, seen in active])
        penalty = per_row("repetition_penalty", sizes)
        less = per_row("frequency_penalty", output_sizes) * counts + per_row("presence_penalty", output_sizes)
        cells, penalty, outputs, less = send([cells, penalty, outputs, less], scores.device)
        flat = scores.view(-1)
        value = flat[cells]
        flat[cells] = torch.where(value > 0, value / penalty, value * penalty)
        flat[outputs] -= less
        scores.clamp_(max=torch.finfo(scores.dtype).max)  # a tiny repetition penalty overflows; -inf stays


def _tensor(values: array[int] | array[float], dtype: torch.dtype) -> Tensor:
    """Return a view, which must be gone before the array grows."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
