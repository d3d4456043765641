"""ExpertPlan: which tokens go to which expert, for one layer of a step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.lora import LoRABatch, Segment


class Group(NamedTuple):
    """Rows ``start..stop-1`` go through this expert."""

    expert: int
    start: int
    stop: int


class ExpertPlan:
    """A row for each token and each of its experts, sorted by expert and then by token.

    ``chosen`` [T, k] (int64) are the experts of each of T tokens, out of ``experts``.
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        self.experts = experts
        self.per_token = chosen.shape[1]
        self.device = chosen.device
        self._sorted, self.order = chosen.flatten().sort(stable=True)
        """[T * k] the rows' experts, and their places in ``chosen``, flattened."""
        self.tokens = self.order // self.per_token
        """[T * k] the rows' tokens."""

    @cached_property
    def ends(self) -> Tensor:
        """[experts] the row after the last one of each expert; nothing is read on the host."""
        every = torch.arange(self.experts, device=self.device)
        return torch.searchsorted(self._sorted, every, right=True)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The experts that have rows; on the host, which waits for a device."""
        ends = self.ends.tolist()
        rows = zip(range(self.experts), [0, *ends[:-1]], ends, strict=True)
        return tuple(Group(*row) for row in rows if row[1] < row[2])

    @cached_property
    def _host_tokens(self) -> Tensor:
        return self.tokens.cpu()

    def total(self, y: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of each token's rows of ``y`` [T * k, out], times ``weights`` [T, k]: [T, out].

        It is added up in float32, in the order in which the token has its experts.
        """
        by_token = torch.empty_like(y)
        by_token[self.order] = y
        by_token = by_token.view(*weights.shape, -1)
        out = by_token[:, 0].float() * weights[:, 0, None]
        for i in range(1, self.per_token):
            out += by_token[:, i].float() * weights[:, i, None]
        return out.to(y.dtype)

    def lora(self, batch: LoRABatch, per_slot: int, per_expert: int) -> LoRABatch:
        """Return the rows of the tokens of ``batch`` by adapter and expert.

        Their slots are numbers of places in a table that has ``per_slot`` of them for each slot, and
        ``per_expert`` for each expert, one expert after the other; see ``SlotMemory.by_place``.
        """
        affine = {segment.slot for segment in batch.affine}
        segment_of = torch.full((batch.num_tokens,), -1, dtype=torch.long)
        for number, segment in enumerate(batch.segments):
            segment_of[segment.start : segment.stop] = number
        numbers = segment_of[self._host_tokens]
        segments: list[Segment] = []
        scaled: list[Segment] = []
        for group, number, start, stop in self._runs(numbers):
            slot, _, _, rank, weight = batch.segments[number]
            place = slot * per_slot + group.expert * per_expert
            segments.append(Segment(place, start, stop, rank, weight))
            if slot in affine:
                scaled.append(segments[-1])
        return LoRABatch.of(segments, scaled, len(numbers), batch.device)

    def _runs(self, numbers: Tensor) -> Iterator[tuple[Group, int, int, int]]:
        """Rows of one expert and one segment that adjoin, if there is an adapter in it."""
        for group in self.groups:
            start = group.start
            for number, run in groupby(numbers[group.start : group.stop].tolist()):
                stop = start + sum(1 for _ in run)
                if number >= 0:
                    yield group, number, start, stop
                start = stop
