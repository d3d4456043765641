"""Repetition, presence and frequency penalties.

The tokens of each request are kept from step to step, so the cost of a step depends on its new tokens and not
on the length of the history: on a CPU as lists, because only the scores of tokens that were seen need to be
touched; on a GPU as tables over the whole vocabulary, because a list would have to be sent in every step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from aioengine.kernels.transfer import send
from aioengine.request import SamplingParams
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

    def update(self, history: Sequence[int], prompt_len: int) -> None:
        """Take in what has been added to the history, which is ``history`` now."""
        self.history = history
        for position, token in enumerate(history[self._known :], self._known):
            self._see(token, is_output=position >= prompt_len)
        self._known = len(history)

    def followed_by(self, draft: Sequence[int]) -> SeenTokens:
        """Return a copy that has seen these in the output as well."""
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


class _Row:
    """The row of a request in the tables on a GPU, and how much of its history that has."""

    def __init__(self, place: int, history: Sequence[int]) -> None:
        self.place, self.history, self.known = place, history, 0


_Place = tuple[int, int, SamplingParams]
"""A row of the scores, its row in the tables, and its penalties."""


def _tensors(layout: Sequence[_Place]) -> list[Tensor]:
    """Return rows of the scores [n], rows in the tables [n], and repetition, frequency and presence penalties
    [3, n]."""
    rows = [torch.tensor([place[i] for place in layout], dtype=torch.int64) for i in (0, 1)]
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    values = [[getattr(params, name) for _, _, params in layout] for name in names]
    return [*rows, torch.tensor(values, dtype=torch.float32)]


class CountTables:
    """The tokens of requests on a GPU: a row of ``vocab`` numbers for each, two of them. There is room for
    ``rows`` requests, and later for more, if there are more at a time."""

    def __init__(self, vocab: int, device: torch.device, rows: int) -> None:
        self._vocab = vocab
        self._rows: dict[str, _Row] = {}
        """Rows of the last step's requests, by request id."""
        self._seen = torch.empty(rows, vocab, dtype=torch.bool, device=device)
        """Whether a token is in the prompt or the output."""
        self._counts = torch.empty(rows, vocab, dtype=torch.int32, device=device)
        """Number of occurrences in the output."""
        self._layout: list[_Place] = []
        """Rows of the last step."""
        self._there: list[Tensor] = []
        """The same on the device: see :func:`_tensors`."""

    def apply(self, scores: Tensor, active: Sequence[tuple[int, SequenceWork]]) -> None:
        """Penalise ``active``, rows of ``scores`` [N, vocab] by number, in place. Sends what is new."""
        before, self._rows, fresh = self._rows, {}, []
        for _, work in active:
            row = before.get(work.request_id)
            if row is not None and row.history is work.history:
                self._rows[work.request_id] = row
            else:  # also another request of that id
                fresh.append(work)
        used = {row.place for row in self._rows.values()} if fresh else set()
        free = [place for place in range(len(active)) if place not in used] if fresh else []
        for work, place in zip(fresh, free, strict=False):
            self._rows[work.request_id] = _Row(place, work.history)
        if fresh:
            self._grow(1 + max(row.place for row in self._rows.values()))
        seen: list[int] = []
        outputs: list[int] = []
        layout: list[_Place] = []
        for number, work in active:
            row = self._rows[work.request_id]
            known, first = row.known, row.place * self._vocab
            cells = [first + token for token in work.history[known:]]
            seen += cells
            outputs += cells if known >= work.prompt_len else cells[work.prompt_len - known :]
            row.known = known + len(cells)
            layout.append((number, row.place, work.params))
        sent = [torch.tensor(each, dtype=torch.int64) for each in (free[: len(fresh)], seen, outputs)]
        if layout != self._layout:  # mostly it is that of the step before, and so are these on the device
            sent += _tensors(layout)
        empty, new_seen, new_outputs, *there = send(sent, scores.device)
        self._there = there or self._there
        self._layout = layout
        numbers, places, values = self._there
        self._seen.index_fill_(0, empty, False)
        self._counts.index_fill_(0, empty, 0)
        self._seen.view(-1).index_fill_(0, new_seen, True)
        self._counts.view(-1).index_add_(0, new_outputs, torch.ones_like(new_outputs, dtype=torch.int32))
        repetition, frequency, presence = values[:, :, None]
        counts = self._counts.index_select(0, places)
        x = scores.index_select(0, numbers)
        penalised = torch.where(x > 0, x / repetition, x * repetition)
        x = torch.where(self._seen.index_select(0, places), penalised, x)
        x -= torch.where(counts > 0, frequency * counts + presence, 0.0)
        scores.index_copy_(0, numbers, x)

    def _grow(self, rows: int) -> None:
        """Make room for ``rows`` rows. Each takes 5 bytes for each token of the vocabulary."""
        missing = rows - len(self._seen)
        if missing > 0:
            missing = max(missing, len(self._seen))
            self._seen = torch.cat([self._seen, self._seen.new_zeros(missing, self._vocab)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(missing, self._vocab)])


class Penalties:
    """Applies the penalties of the rows of successive steps, which have mostly up to ``rows`` rows."""

    def __init__(self, rows: int = 8) -> None:
        self._rows = rows
        self._tables: CountTables | None = None
        """Tables on a GPU, made when they are needed."""
        self._seen: dict[str, SeenTokens] = {}
        """Counts of the last step's requests, by request id."""

    def apply(self, scores: Tensor, rows: Sequence[SequenceWork]) -> None:
        """Penalise ``scores`` [N, vocab], float32, in place, touching only the tokens that were seen."""
        if scores.device.type != "cpu" and not any(row.draft for row in rows):
            wanted = [(i, row) for i, row in enumerate(rows) if row.params.has_penalties]
            if wanted:
                self._tables = self._tables or CountTables(scores.shape[1], scores.device, self._rows)
                self._tables.apply(scores, wanted)
                scores.clamp_(max=torch.finfo(scores.dtype).max)
            return
        before, self._seen = self._seen, {}
        active: list[tuple[int, SequenceWork, SeenTokens]] = []
        for i, row in enumerate(rows):
            if row.params.has_penalties:
                seen = self._seen.get(row.request_id) or before.get(row.request_id)
                if seen is None or seen.history is not row.history:  # another request of that id
                    seen = SeenTokens(row.history)
                seen.update(row.history, row.prompt_len)
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
