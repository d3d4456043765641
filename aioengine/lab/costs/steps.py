"""Cost model of steps: a step's properties, and the seconds that it takes.

No torch here. What the coefficients mean and where they come from is in docs/lab-costs.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Annotated, Any, NamedTuple, Self

import msgspec
from msgspec import Meta

from aioengine.checks import LARGEST, Count, check_fields
from aioengine.errors import ConfigError
from aioengine.step import StepBatch

NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Curve = tuple[tuple[NotNegative, NotNegative], ...]
"""Points (x, seconds), by x. Constant before the first, linear between two, and linear after the last."""
NONE: Curve = ((0.0, 0.0),)


class StepShape(NamedTuple):
    """Properties of a step that its time depends on."""

    decode_rows: int
    """Number of sequences that decode."""
    decode_kv: int
    """Sum of the positions whose keys and values these rows read."""
    prefill_tokens: int
    prefill_pairs: int
    """Query-key pairs of the prefill chunks: the sum of tokens * (start + tokens / 2), rounded."""
    sequences: int
    adapters: tuple[tuple[int, int], ...] = ()
    """Rank and tokens of each distinct adapter in the batch."""


def step_shape(batch: StepBatch) -> StepShape:
    """Return the shape of a step; the calibration and the simulation both use this."""
    rows, ranks = batch.sequences, batch.slot_ranks
    others = [work for work in rows if work.start < work.prompt_len or len(work.tokens) > 1]
    decode_rows, tokens = len(rows) - len(others), Counter([work.slot for work in rows])
    decode_kv = sum([work.start for work in rows]) + decode_rows
    prefill_tokens = twice_pairs = 0
    for work in others:
        count, start = len(work.tokens), work.start
        decode_kv -= start
        prefill_tokens += count
        twice_pairs += count * (2 * start + count)
        tokens[work.slot] += count - 1
    adapters = [(ranks[slot], count) for slot, count in tokens.items() if slot >= 0]
    return StepShape(
        decode_rows,
        decode_kv,
        prefill_tokens,
        twice_pairs // 2,
        len(rows),
        tuple(adapters),
    )


class StepCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of each property in a :class:`StepShape`; none is negative."""

    step: NotNegative = 0.0
    """Seconds of every step."""
    linears: Curve = NONE
    """Seconds of the base model's linears, by tokens. It never falls."""
    tile: Count = 1
    """Tokens that are computed together: beyond the first tile, a part of a tile costs as much as a whole
    one."""
    sequence: NotNegative = 0.0
    """Each sequence in the batch: the output layer, sampling, bookkeeping."""
    decode_kv: NotNegative = 0.0
    """Each position whose keys and values a decode row reads."""
    prefill_pair: NotNegative = 0.0
    """Each query-key pair of a prefill chunk."""
    lora_step: NotNegative = 0.0
    """A step with any adapter."""
    adapter: Curve = NONE
    """Each distinct adapter, by its rank."""
    lora_token: Curve = NONE
    """Each token that has an adapter, by its adapter's rank."""
    padded: bool = False
    """Whether each adapter costs as much as the largest one in the batch, as with kernels that pad ranks
    (Punica's BGMV, arXiv 2310.18547)."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("linears", "adapter", "lora_token"):
            curve: Curve = getattr(self, field)
            if not curve:
                raise ConfigError(f"steps.{field}=[]: must have a point")
            if any(after <= before for (before, _), (after, _) in pairwise(curve)):
                raise ConfigError(f"steps.{field}: its points must be in order, each beyond the one before")
        if any(after < before for (_, before), (_, after) in pairwise(self.linears)):
            raise ConfigError("steps.linears: falls; more tokens cannot take less time")

    def rounded(self) -> Self:
        """Return a copy with every number of seconds rounded by :func:`significant`."""
        changed: dict[str, Any] = {}
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if isinstance(value, tuple):
                changed[field] = tuple((x, significant(y)) for x, y in value)
            elif field not in ("tile", "padded"):
                changed[field] = significant(value)
        return msgspec.structs.replace(self, **changed)


class StepTimes:
    """Computes the seconds of many :class:`StepShape` values, and remembers the values of curves."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._linears: dict[int, float] = {}
        self._adapters: dict[tuple[int, int], float] = {}
        """Seconds of an adapter in a step, by its rank and its tokens."""

    def __call__(self, shape: StepShape) -> float:
        return next(self.repeated(shape))

    def repeated(self, shape: StepShape) -> Iterator[float]:
        """Yield the seconds of a step of decodes, then of the one after it, in which each row reads one more
        position, and so on: what a call gives for each of them, to the last bit."""
        rows, kv, prefill, pairs, sequences, adapters = shape
        c, tokens = self._costs, rows + prefill
        linears = self._linears.get(tokens)
        if linears is None:
            linears = self._linears[tokens] = curve_at(c.linears, in_tiles(tokens, c.tile))
        first = c.step + linears + c.sequence * sequences
        last, more = c.prefill_pair * pairs, self._of_adapters(adapters)
        while True:
            yield reduce(add, more, first + c.decode_kv * kv + last)
            kv += rows

    def _of_adapters(self, adapters: Sequence[tuple[int, int]]) -> list[float]:
        if not adapters:
            return []
        if self._costs.padded:
            largest = max(rank for rank, _ in adapters)
            adapters = [(largest or own, count) for own, count in adapters]
        known = self._adapters
        for rank, tokens in adapters:
            if (rank, tokens) not in known:
                token = curve_at(self._costs.lora_token, rank)
                known[rank, tokens] = curve_at(self._costs.adapter, rank) + token * tokens
        return [self._costs.lora_step, *map(known.__getitem__, adapters)]


def in_tiles(tokens: int, tile: int) -> int:
    """Round a number of tokens up to whole tiles, which determine a step's time."""
    return tokens if tokens <= tile else -(-tokens // tile) * tile


def curve_at(curve: Curve, x: float) -> float:
    """Return the curve's value at ``x``; beyond the last point it does not fall below that."""
    if x <= curve[0][0] or len(curve) == 1:
        return curve[0][1]
    after = min(bisect_right(curve, x, key=lambda point: point[0]), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[after - 1], curve[after]
    slope = (y1 - y0) / (x1 - x0)
    return y0 + slope * (x - x0) if x <= x1 else y1 + max(slope, 0.0) * (x - x1)


def significant(value: float) -> float:
    """Round to four significant digits; timings are not more accurate."""
    return float(f"{value:.4g}")
