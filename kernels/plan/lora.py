"""What a step's LoRA operations need to know about the batch, built once and used in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.derived import Derivable
from aioengine.kernels.transfer import send

_SHORT = 16
"""Segments up to this many tokens are padded to one length: padding is cheaper than more calls."""


class Segment(NamedTuple):
    """Tokens ``start..stop-1`` of the step use the adapter in ``slot``, which has this ``rank``."""

    slot: int
    start: int
    stop: int
    rank: int


class Group(NamedTuple):
    """Segments of similar rank and length, as one batched product of ``[size, length, ...]``."""

    rank: int
    """The largest of the segments'."""
    slots: slice | Tensor
    """Selects the group's slots from a pool's first dimension; a slice, hence a view, if possible."""
    size: int
    """Number of slots selected; a few may have no segment, if that spares copying the others."""
    length: int
    """Of the longest segment; the others are padded to it."""
    start: int
    """First token, if the slots' segments adjoin and all have ``length``; then ``tokens`` is None."""
    tokens: Tensor | None
    """[size * length] token of each padded row; padding repeats a token of the segment."""


class Grouping(NamedTuple):
    """All segments as groups, whose padded rows follow each other: R rows in all."""

    groups: tuple[Group, ...]
    first: int
    """First token with an adapter; those with one are the step's last, since sequences are sorted."""
    num_rows: int
    order: Tensor | None
    """[num_tokens - first] the padded row of each token from ``first`` on; None if it is the same."""


class AffineRows(NamedTuple):
    """The tokens whose outputs are scaled or shifted."""

    long: tuple[Segment, ...]
    """Taken one by one: their slot's values are broadcast, not copied for each token."""
    tokens: Tensor | None
    """[M] the tokens of all short segments, or None if there are none."""
    slots: Tensor | None
    """[M] the slot of each."""


class LoRABatch(Derivable):
    """Segments of a step's tokens by adapter slot.

    ``slots`` and ``counts`` give each sequence's slot (-1: no adapter) and number of tokens, sequences
    sorted by slot; ``slot_ranks`` gives the rank in each slot of the pool, and ``slot_affine`` says which
    slots scale or shift outputs (empty: none). Index tensors live on ``device``. Raises ValueError if the
    sequences are not sorted or a slot holds no adapter.
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

    @cached_property
    def slot_of_token(self) -> Tensor:
        """[num_tokens - first] the slot of each token from the first one with an adapter."""
        counts = torch.tensor([s.stop - s.start for s in self.segments])
        slots = torch.tensor([s.slot for s in self.segments])
        return _sent(slots.repeat_interleave(counts), self.device)

    @cached_property
    def affine_rows(self) -> AffineRows:
        """The tokens of ``affine``, arranged for the fewest operations and copies."""
        short = [s for s in self.affine if s.stop - s.start <= _SHORT]
        long = tuple(s for s in self.affine if s.stop - s.start > _SHORT)
        if not short:
            return AffineRows(long, None, None)
        tokens = [token for s in short for token in range(s.start, s.stop)]
        slots = [s.slot for s in short for _ in range(s.start, s.stop)]
        return AffineRows(long, *send([torch.tensor(tokens), torch.tensor(slots)], self.device))

    @cached_property
    def grouping(self) -> Grouping:
        """The segments grouped for batched products; padding never doubles a long group's work."""
        top_rank = max(segment.rank for segment in self.segments)
        by_key: dict[tuple[int, int], list[Segment]] = {}
        for segment in self.segments:
            length = segment.stop - segment.start
            bucket = 0 if length <= _SHORT else (length - 1).bit_length()
            # Less than a quarter of the largest rank is worth a product of its own.
            smaller = (top_rank // segment.rank).bit_length() // 3
            by_key.setdefault((bucket, smaller), []).append(segment)

        first = self.segments[0].start
        order = [0] * (self.num_tokens - first)
        groups: list[Group] = []
        row = 0
        for segments in by_key.values():
            group, row_of_segment = _group(segments, self.device)
            groups.append(group)
            for segment, offset in zip(segments, row_of_segment, strict=True):
                rows = range(row + offset, row + offset + segment.stop - segment.start)
                order[segment.start - first : segment.stop - first] = rows
            row += group.size * group.length
        same = order == list(range(row))
        tensor = None if same else _sent(torch.tensor(order), self.device)
        return Grouping(tuple(groups), first, row, tensor)


def _group(segments: list[Segment], device: torch.device) -> tuple[Group, list[int]]:
    """The group of these segments (in slot order), and each segment's first padded row in it."""
    lengths = [s.stop - s.start for s in segments]
    rank, length, start = max(s.rank for s in segments), max(lengths), segments[0].start
    low, high = segments[0].slot, segments[-1].slot + 1
    dense = high - low == len(segments)
    selector: slice | Tensor
    if dense or (length <= _SHORT and high - low <= 2 * len(segments)):
        selector, size = slice(low, high), high - low
        first_rows = [(s.slot - low) * length for s in segments]
    else:
        selector, size = _sent(torch.tensor([s.slot for s in segments]), device), len(segments)
        first_rows = list(range(0, size * length, length))
    if dense and min(lengths) == length and segments[-1].stop - start == size * length:
        return Group(rank, selector, size, length, start, None), first_rows
    padded = [start] * (size * length)
    for segment, count, row in zip(segments, lengths, first_rows, strict=True):
        padded[row : row + count] = range(segment.start, segment.stop)
        padded[row + count : row + length] = [segment.start] * (length - count)
    return Group(rank, selector, size, length, start, _sent(torch.tensor(padded), device)), first_rows


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return send([tensor], device)[0]
