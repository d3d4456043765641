"""What a step's LoRA operations need to know about the batch, built once and used in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_SHORT = 16
"""Segments up to this many tokens are padded to one length: padding is cheaper than more calls."""


class Segment(NamedTuple):
    """Tokens ``start..stop-1`` of the step use the adapter in ``slot``, which has this ``rank``."""

    slot: int
    start: int
    stop: int
    rank: int


class Group(NamedTuple):
    """Segments of equal rank and similar length, as one batched product of ``[G, length, ...]``."""

    rank: int
    slots: slice | Tensor
    """Selects the G slots from a pool tensor's first dimension; a slice, hence a view, if possible."""
    size: int
    length: int
    start: int
    """First token, if the segments are adjacent and all of ``length`` tokens (``tokens`` is None)."""
    padded: Tensor | None
    """[G * length] token of each padded row; padding repeats a token of the same segment."""
    tokens: Tensor | None
    """[n] the tokens of the group, each once."""
    rows: Tensor | None
    """[n] the padded row of each of ``tokens``."""


class LoRABatch:
    """Segments of a step's tokens by adapter slot.

    ``slots`` and ``counts`` give each sequence's slot (-1: no adapter) and number of tokens, sequences
    sorted by slot; ``slot_ranks`` gives the rank in each slot of the pool. Index tensors live on
    ``device``. Raises ValueError if the sequences are not sorted or a slot holds no adapter.
    """

    def __init__(
        self,
        slots: Sequence[int],
        counts: Sequence[int],
        slot_ranks: Sequence[int],
        device: torch.device | str = "cpu",
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
        self.segments: tuple[Segment, ...] = tuple(segments)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The segments grouped for batched products; padding never doubles a long group's work."""
        by_key: dict[tuple[int, int], list[Segment]] = {}
        for segment in self.segments:
            length = segment.stop - segment.start
            bucket = 0 if length <= _SHORT else (length - 1).bit_length()
            by_key.setdefault((segment.rank, bucket), []).append(segment)
        return tuple(_group(segments, self.device) for segments in by_key.values())


def _group(segments: list[Segment], device: torch.device) -> Group:
    slots = [s.slot for s in segments]
    lengths = [s.stop - s.start for s in segments]
    length, start = max(lengths), segments[0].start
    selector: slice | Tensor
    if slots[-1] - slots[0] + 1 == len(slots):
        selector = slice(slots[0], slots[-1] + 1)
    else:
        selector = torch.tensor(slots, device=device)
    if min(lengths) == length and segments[-1].stop - start == length * len(segments):
        return Group(segments[0].rank, selector, len(slots), length, start, None, None, None)
    padded: list[int] = []
    tokens: list[int] = []
    rows: list[int] = []
    for segment, count in zip(segments, lengths, strict=True):
        tokens.extend(range(segment.start, segment.stop))
        rows.extend(range(len(padded), len(padded) + count))
        padded.extend(range(segment.start, segment.stop))
        padded.extend([segment.start] * (length - count))
    return Group(
        segments[0].rank,
        selector,
        len(slots),
        length,
        start,
        torch.tensor(padded, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(rows, device=device),
    )
