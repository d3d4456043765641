"""DecodeTables: what decode steps of the same sequences read, in memory that is kept from step to step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

SPARE_BLOCKS = 16
"""Further blocks of a sequence that the tables have room for."""


class DecodeTables:
    """Tokens, spans and block tables of sequences that compute a token each, and one position more in each
    step: of a table only what is new is written.

    Args:
        starts: The positions that are computed first.
        tables: The sequences' block tables, to which blocks are added before they are needed.
    """

    def __init__(self, starts: Sequence[int], tables: Sequence[Sequence[int]], block_size: int) -> None:
        count = len(starts)
        self._starts, self._tables, self._block_size = starts, tables, block_size
        self.first = starts[0]
        """The position of the first sequence that is computed first."""
        self._highest = max(starts)
        self._width = 0
        self._cells = array("i")
        self._ids = array("q", bytes(8 * count))
        self._spans = array("i", [number for row in range(count) for number in (row, 1, 0)])
        self.found = array("q", bytes(8 * count))
        """[N] room for the most likely tokens."""
        self.best = torch.frombuffer(self.found, dtype=torch.int64)
        """The same as a tensor."""
        self.known_to: object = None
        """Whoever has the addresses as they are; None once they are others."""
        self._beginning: list[list[int]] = [[] for _ in range(block_size)]
        """By number of the step, modulo ``block_size``: the sequences that begin a block in it."""
        for place, start in enumerate(starts):
            self._beginning[-start % block_size].append(place)

    @property
    def width(self) -> int:
        """Columns of the block tables."""
        return self._width

    def positions(self, steps: int) -> int:
        """Return the number of positions that a step has to know, in whole blocks."""
        return ((self._highest + steps) // self._block_size + 1) * self._block_size

    @property
    def ids(self) -> int:
        """Address of the tokens: [N] of int64."""
        return self._ids.buffer_info()[0]

    @property
    def spans(self) -> int:
        """Address of row, length and start of each sequence: [N, 3] of int32."""
        return self._spans.buffer_info()[0]

    @property
    def tables(self) -> int:
        """Address of the block tables: [N, width] of int32."""
        return self._cells.buffer_info()[0]

    def write(self, steps: int, tokens: Sequence[int]) -> None:
        """Write what the sequences compute ``steps`` after the first one: these tokens. Steps are written in
        a row; afterwards addresses may be others."""
        size = self._block_size
        self._ids[:] = array("q", tokens)
        self._spans[2::3] = array("i", [start + steps for start in self._starts])
        if (self._highest + steps) // size >= self._width:
            self._widen(steps)
            return
        for place in self._beginning[steps % size]:
            at = (self._starts[place] + steps) // size
            self._cells[place * self._width + at] = self._tables[place][at]

    def _widen(self, steps: int) -> None:
        needed = (self._highest + steps) // self._block_size + 1
        self._width = needed + SPARE_BLOCKS
        self.known_to = None
        self._cells = array("i", bytes(4 * len(self._tables) * self._width))
        for place, table in enumerate(self._tables):
            known = table[:needed]
            begin = place * self._width
            self._cells[begin : begin + len(known)] = array("i", known)
