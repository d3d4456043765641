"""LoRABatch: a step's adapters as LoRA operations need them, built once and used in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aioengine.kernels.plan.derived import Derivable

_WIDTH = 16
"""``LoRABatch.width`` is a multiple of this, so that rows of A's outputs are whole vectors."""


class Segment(NamedTuple):
    """Tokens ``start..stop-1`` of the step use the adapter in ``slot``, which has this ``rank``."""

    slot: int
    start: int
    stop: int
    rank: int


class LoRABatch(Derivable):
    """Segments of a step's tokens by adapter slot.

    ``slots`` and ``counts`` give each sequence's slot (-1: no adapter) and number of tokens, sequences
    sorted by slot; ``slot_ranks`` gives the largest rank of the adapter in each slot, and ``slot_affine``
    says which slots scale or shift outputs (empty: none). Index tensors live on ``device``. Raises ValueError
    if the sequences are not sorted or a slot holds no adapter.
    """

    def __init__(
        self,
        slots: Sequence[int],
        counts: Sequence[int],
        slot_ranks: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        slot_affine: Sequence[bool] = (),
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.num_tokens = sum(counts)
        segments: list[Segment] = []
        start, previous = 0, -1
        for slot, count in zip(slots, counts, strict=True):
            if slot < previous:
                raise ValueError(f"sequences must be sorted by slot: {slot} follows {previous}")
            if slot >= len(slot_ranks) or (slot >= 0 and slot_ranks[slot] <= 0):
                raise ValueError(f"slot {slot} holds no adapter; slot_ranks={list(slot_ranks)}")
            if slot >= 0 and count > 0:
                if segments and segments[-1].slot == slot:
                    segments[-1] = segments[-1]._replace(stop=start + count)
                else:
                    segments.append(Segment(slot, start, start + count, slot_ranks[slot]))
            start, previous = start + count, slot
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.affine: tuple[Segment, ...] = tuple(s for s in segments if slot_affine and slot_affine[s.slot])
        """The segments whose slots scale or shift outputs; mostly none, and then that costs nothing."""
        self.width = _width(segments)
        """Width of A's outputs: the largest rank of the segments, rounded up."""

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        affine: Sequence[Segment],
        num_tokens: int,
        device: torch.device,
    ) -> LoRABatch:
        """Return a batch of these segments, which may have gaps between them."""
        batch = cls([], [], [], device)
        batch.num_tokens = num_tokens
        batch.segments, batch.affine = tuple(segments), tuple(affine)
        batch.width = _width(segments)
        return batch


def _width(segments: Sequence[Segment]) -> int:
    largest = max((segment.rank for segment in segments), default=0)
    return -(-largest // _WIDTH) * _WIDTH
