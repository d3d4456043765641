"""LoRABatch: a step's adapters as LoRA operations need them, built once and used in every layer."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from aioengine.kernels.plan.derived import Derivable
from aioengine.kernels.transfer import send

_WIDTH = 16
"""``LoRABatch.width`` is a multiple of this, so that rows of A's outputs are whole vectors."""


class Segment(NamedTuple):
    """Tokens ``start..stop-1`` of the step use the adapter in ``slot``, which has this ``rank``."""

    slot: int
    start: int
    stop: int
    rank: int
    weight: float = 1.0
    """Factor of what the adapter adds."""


class LoRABatch(Derivable):
    """Segments of a step's tokens by adapter slot.

    ``slots`` and ``counts`` give each sequence's slot (-1: no adapter) and number of tokens, sequences
    sorted by slot; ``slot_ranks`` gives the largest rank of the adapter in each slot, ``slot_affine`` says
    which slots scale or shift outputs (empty: none), and ``scales`` what each sequence's adapter is
    multiplied by (empty: by 1). Index tensors live on ``device``. Raises ValueError if the sequences are not
    sorted or a slot holds no adapter.
    """

    def __init__(
        self,
        slots: Sequence[int],
        counts: Sequence[int],
        slot_ranks: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        slot_affine: Sequence[bool] = (),
        scales: Sequence[float] = (),
    ) -> None:
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
        self.is_weighted = False
        """Whether A's outputs are multiplied by weights."""
        if scales.count(1.0) < len(scales):
            segments = _scaled(segments, counts, scales)
            self.is_weighted = any(segment.weight != 1.0 for segment in segments)
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
        batch.is_weighted = any(segment.weight != 1.0 for segment in segments)
        return batch


def row_weights(batch: LoRABatch) -> torch.Tensor:
    """Return each token's weight, to be multiplied with A's outputs: [T, 1, 1] of float32."""
    weights = torch.ones(batch.num_tokens, 1, 1)
    for _, start, stop, _, weight in batch.segments:
        weights[start:stop] = weight
    return send([weights], batch.device)[0]


def _scaled(segments: Sequence[Segment], counts: Sequence[int], scales: Sequence[float]) -> list[Segment]:
    """Cut segments into those of equal scale, with that as their weight."""
    found: list[Segment] = []
    for start, count, scale in zip(accumulate(counts, initial=0), counts, scales, strict=False):
        own = next((segment for segment in segments if segment.start <= start < segment.stop), None)
        if own is None or not count:
            continue
        last = found[-1] if found else None
        if last is not None and (last.slot, last.stop, last.weight) == (own.slot, start, scale):
            found[-1] = last._replace(stop=start + count)
        else:
            found.append(own._replace(start=start, stop=start + count, weight=scale))
    return found


def segment_table(segments: Iterable[Segment]) -> torch.Tensor:
    """[count, 5] of int32: slot, begin, end, rank, and the bits of the weight."""
    return torch.tensor([(*segment[:4], _bits(segment.weight)) for segment in segments], dtype=torch.int32)


def _bits(weight: float) -> int:
    """Return the bits of a float32 as an int32."""
    return int.from_bytes(struct.pack("<f", weight), "little", signed=True)


def _width(segments: Sequence[Segment]) -> int:
    largest = max((segment.rank for segment in segments), default=0)
    return -(-largest // _WIDTH) * _WIDTH
