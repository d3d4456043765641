"""A draw from the tokens of one row in rank order, on a CPU, without a sort of them all.

For x <= 0 the bits of |x| grow as x falls, so the upper half of them numbers buckets that are in rank order:
128 between x and 2x, however flat or steep the row is. Sums by bucket say in which one a rank or a share of
the mass is; only the tokens of that one are sorted. Sums are in the order of ids, so that they depend on
nothing but the row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.request import SamplingParams

_BUCKETS = (0x7F80_0000 >> 16) + 1
"""The last one is that of -inf."""


class _Bucket(NamedTuple):
    before: int
    """Number of the tokens in earlier buckets."""
    ids: Tensor
    ends: Tensor
    """The row's running sum after each of ``ids``."""


class Ranks:
    """The tokens of a row by descending score, equals by ascending id.

    Args:
        x: [vocab] float32, 0 at most; the mass of a token is e^x.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._bucket = x.abs().view(torch.int32) >> 16
        mass = x.double().exp_()
        self._counts = self._bucket.bincount(minlength=_BUCKETS).cumsum(0)
        self._masses = self._bucket.bincount(mass, minlength=_BUCKETS).cumsum(0)
        self._sorted: dict[int, _Bucket] = {}

    def draw(self, params: SamplingParams, uniform: float) -> int:
        """Return the token at ``uniform`` in [0, 1) of the mass that the filters of ``params`` keep."""
        if self._masses[-1].isnan():  # the largest score was infinite, and has become NaN
            return int(self._x.argmax())
        keep = vocab = len(self._x)
        if 0 < params.top_k < vocab:
            keep = params.top_k
        if params.top_p < 1.0:
            # A token is in the nucleus if the more likely ones do not reach top_p yet. Its mass is a share of
            # what top-k left.
            keep = min(keep, 1 + self._count(params.top_p * self._mass(keep), reached=False))
        if params.min_p > 0.0:
            keep = min(keep, int((self._x.double() >= math.log(params.min_p)).sum()))
        rank = min(self._count(uniform * self._mass(keep), reached=True), keep - 1)
        bucket = self._sort(self._bucket_of(rank))
        return int(bucket.ids[rank - bucket.before])

    def _bucket_of(self, rank: int) -> int:
        return int(torch.searchsorted(self._counts, rank, right=True))

    def _mass(self, count: int) -> float:
        """Return the mass of the ``count`` most likely tokens."""
        number = self._bucket_of(count - 1)
        if self._counts[number] == count:
            return float(self._masses[number])
        bucket = self._sort(number)
        return float(bucket.ends[count - 1 - bucket.before])

    def _count(self, mass: float, *, reached: bool) -> int:
        """Return how many running sums are below ``mass``, or also those that are equal (``reached``)."""
        number = int(torch.searchsorted(self._masses, mass, right=reached))
        if number == _BUCKETS:
            return len(self._x)
        bucket = self._sort(number)
        return bucket.before + int(torch.searchsorted(bucket.ends, mass, right=reached))

    def _sort(self, number: int) -> _Bucket:
        found = self._sorted.get(number)
        if found is None:
            ids = (self._bucket == number).nonzero()[:, 0]
            values = self._x[ids]
            if values.amin() < values.amax():  # a row of equals is in order
                values, order = values.sort(descending=True, stable=True)
                ids = ids[order]
            ends = values.double().exp_()
            before = 0
            if number:
                before = int(self._counts[number - 1])
                ends[0] += self._masses[number - 1]
            found = self._sorted[number] = _Bucket(before, ids, ends.cumsum_(0))
        return found
