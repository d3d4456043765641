"""AttentionPlan: a step's sequences as attention needs them, built once and used in every layer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels.plan.derived import Derivable
from aioengine.kernels.transfer import send


class Span(NamedTuple):
    """One sequence's share of a step: rows ``row..row+length-1`` hold its tokens from ``start`` on."""

    row: int
    length: int
    start: int


class AttentionPlan(Derivable):
    """Places of a step's tokens, of their keys and values, and of the keys and values before them.

    ``spans`` cover the token axis in order; ``tables`` are the sequences' block tables. Position p of a
    sequence is in block ``table[p // block_size]`` at ``p % block_size``; its *cell* is
    ``block * block_size + offset``. Tensors live on ``device``.
    """

    padded = False
    """Whether there are rows of no sequence, whose attention is 0."""

    def __init__(
        self,
        spans: Sequence[Span],
        tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spans: tuple[Span, ...] = tuple(spans)
        self.block_size = block_size
        self._tables = tables
        self.device = torch.device(device)
        width = max(len(table) for table in tables)
        padded = array("i")
        for table in tables:
            padded.extend(table)
            if len(table) < width:
                padded.extend([0] * (width - len(table)))
        self.host_tables = torch.frombuffer(padded, dtype=torch.int32).view(len(tables), width)
        """:attr:`tables` on the host."""
        if self.device.type != "cpu":
            sent = send([*self._host_places, self.host_tables], self.device)
            self.positions, self.cells, self.tables = sent
        else:  # places when they are asked for: the compiled step finds them itself
            self.tables = self.host_tables

    tables: Tensor
    """[N, width] block tables, padded (int32)."""

    @cached_property
    def positions(self) -> Tensor:
        """[T] absolute position of each token (int64)."""
        return self._host_places[0]

    @cached_property
    def cells(self) -> Tensor:
        """[T] the cell where each token's key and value are stored (int64); below 0: nowhere."""
        return self._host_places[1]

    @cached_property
    def _host_places(self) -> tuple[Tensor, Tensor]:
        spans, size = self.spans, self.block_size
        if all(span.length == 1 for span in spans):  # decoding: numbers in Python take less than operations
            places = [span.start for span in spans]
            blocks = [table[at // size] for table, at in zip(self._tables, places, strict=True)]
            inside = [block * size + at % size for block, at in zip(blocks, places, strict=True)]
            return torch.tensor(places), torch.tensor(inside)
        counts = torch.tensor([span.length for span in spans])
        first = torch.tensor([span.start - span.row for span in spans])
        sequence = torch.repeat_interleave(torch.arange(len(spans)), counts)
        positions = torch.arange(len(sequence)) + first[sequence]
        return positions, locate(self.host_tables, size, sequence, positions)

    @cached_property
    def span_table(self) -> Tensor:
        """[N, 3] row, length and start of each sequence (int32, on the host)."""
        numbers = array("i", chain.from_iterable(self.spans))
        return torch.frombuffer(numbers, dtype=torch.int32).view(-1, 3)

    @cached_property
    def last(self) -> Tensor:
        """[T] whether a token is its sequence's last in this step (uint8, on the host)."""
        if len(self.spans) == len(self.positions):
            return torch.ones(len(self.spans), dtype=torch.uint8)
        last = torch.zeros(len(self.positions), dtype=torch.uint8)
        last[[span.row + span.length - 1 for span in self.spans]] = 1
        return last


def locate(tables: Tensor, block_size: int, sequence: Tensor, positions: Tensor) -> Tensor:
    """Return the cells of ``positions`` in the sequences of these indices (broadcast), whose tables are the
    rows."""
    block = tables[sequence, positions // block_size].long()
    return block * block_size + positions % block_size
