"""Design of a calibration: the shapes of steps that are timed, and loads beside steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from aioengine.config import ALLOWED_RANKS

PROMPTS = (8, 16, 24, 32, 48, 64, 65, 80, 96, 128, 129, 192, 256, 257, 384, 512, 1024, 2048)
MOST_MIXED = 24
"""Maximum rows that decode beside prompts in a random batch."""
LONGEST_MIXED = 512
"""Tokens of the longest prompt in it."""


class Row(NamedTuple):
    """A sequence's share of a step."""

    tokens: int
    """Tokens to compute: 1 with ``start`` > 0 is a decode, anything else is a part of a prompt."""
    start: int
    """Earlier positions, whose keys and values are read."""
    adapter: str | None = None


class Part(NamedTuple):
    """A step."""

    what: str
    """Description in words."""
    rows: tuple[Row, ...]


class Design(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is timed. Values of related fields are combined with each other."""

    rows: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    """Numbers of sequences that decode together, combined with ``contexts``."""
    contexts: tuple[int, ...] = (64, 384, 1536)
    """Tokens before the decoded one. Only the first is combined with all numbers of rows."""
    tokens: int = 12_288
    """Maximum positions of all rows together."""
    prompts: tuple[int, ...] = PROMPTS
    """Tokens of a prompt that is computed alone."""
    ranks: tuple[int, ...] = (8, 16, 64)
    """Ranks of adapters. Slots are sized for the largest."""
    adapters: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of distinct adapters of one rank in a batch."""
    mixtures: int = 96
    """Number of random batches as in serving, with prompts beside decodes."""
    repeats: int = 5
    """Number of rounds, in each of which every step is timed once."""
    seconds: float = 100.0
    """Seconds after which no other round begins."""
    live_rows: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of sequences that decode as in serving, to time the gap between steps."""
    live_steps: int = 20
    """Number of steps for each of them."""
    loads: int = 6
    """Adapters of each rank that are read and copied while others decode."""
    max_num_batched_tokens: int = 2048
    seed: int = 0

    @property
    def max_rows(self) -> int:
        return max(*self.rows, *self.live_rows, MOST_MIXED + 3)

    @property
    def slot_rank(self) -> int:
        """Return the smallest slot rank that fits all adapters."""
        return min(rank for rank in ALLOWED_RANKS if rank >= max(self.ranks))

    def names(self, rank: int) -> list[str]:
        """Return the names of the adapters of one rank."""
        return [f"rank-{rank}-{i}" for i in range(max(self.adapters))]

    def parts(self, longest: int) -> list[Part]:
        """Return all steps to time, without those that have more than ``longest`` positions, the model's
        maximum, or exceed the design's own bounds."""
        found = (*self._alone(), *self._with_adapters(), *self._mixtures())
        return [part for part in found if self._fits(part, longest)]

    def _fits(self, part: Part, longest: int) -> bool:
        if max(row.start + row.tokens for row in part.rows) > longest:
            return False
        computed = sum(row.tokens for row in part.rows)
        held = sum(row.start + row.tokens for row in part.rows)
        return computed <= self.max_num_batched_tokens and held <= self.tokens

    def _alone(self) -> Iterator[Part]:
        """Yield decodes, prompts, and parts of prompts, of the base model."""
        for i, context in enumerate(self.contexts):
            for rows in self.rows if i == 0 else self.rows[::3]:
                yield Part(f"{rows} rows after {context} tokens", (Row(1, context),) * rows)
        for tokens in self.prompts:
            for start in (0, *self.contexts[1:]) if tokens in (64, 512) else (0,):
                yield Part(f"{tokens} of a prompt after {start}", (Row(tokens, start),))

    def _with_adapters(self) -> Iterator[Part]:
        for rank in self.ranks:
            names = self.names(rank)
            for rows in self.rows[::3]:
                for count in self.adapters:
                    if count <= rows:
                        what = f"{rows} rows, {count} adapters of rank {rank}"
                        decode = (Row(1, self.contexts[0], names[row % count]) for row in range(rows))
                        yield Part(what, tuple(decode))
            for tokens in self.prompts[3::6]:
                yield Part(f"a prompt of {tokens}, an adapter of rank {rank}", (Row(tokens, 0, names[0]),))

    def _mixtures(self) -> Iterator[Part]:
        """Draw batches of decodes and one to three prompts. Lengths are uniform on a logarithmic scale. Three
        of four batches have adapters: half of these all of one rank, the others of any."""
        rng = random.Random(self.seed)
        low, high = min(self.prompts), min(max(self.prompts), LONGEST_MIXED)
        numbers = (0, *(rows for rows in self.rows if rows <= MOST_MIXED))
        for _ in range(self.mixtures):
            ranks = self.ranks if rng.random() < 0.5 else (rng.choice(self.ranks),)
            names: list[str | None] = [None]
            if rng.random() < 0.75:
                known = [name for rank in ranks for name in self.names(rank)]
                names = [*rng.sample(known, rng.choice(self.adapters))]
            rows = [
                Row(1, rng.randint(min(self.contexts[:2]), max(self.contexts[:2])), rng.choice(names))
                for _ in range(rng.choice(numbers))
            ]
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                rows.append(Row(round(low * (high / low) ** rng.random()), 0, rng.choice(names)))
            yield Part(f"{len(rows)} sequences, prompts among them", tuple(rows))
