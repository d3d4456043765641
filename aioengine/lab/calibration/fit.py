"""Fits the coefficients of a cost model to times: non-negative least squares on relative errors."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from aioengine.lab.calibration.probe import Probe
from aioengine.lab.costs.model import FitQuality, Stage
from aioengine.lab.costs.steps import NONE, StepCosts, StepShape, StepTimes, in_tiles, significant

Array = NDArray[np.float64]

KNOTS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Tokens at which the linears' curve may bend."""
TILES = (1, 8, 16, 32, 64, 128, 256)
WORTH = 0.95
"""A tile of more than one token must reduce the errors to this share."""
OUTLIER = 5.0
"""Errors larger than this multiple of the median are ignored when tiles are compared."""
ROUNDS = 8
"""Rounds of reweighting, enough for the weights to converge."""


def fit_steps(points: Sequence[tuple[StepShape, float]]) -> tuple[StepCosts, FitQuality]:
    """Find the coefficients with the smallest relative errors, for steps and their seconds.

    Solved by non-negative least squares (Lawson and Hanson, 1974), reweighted so that outliers count
    linearly (Huber, 1964). A curve is also a sum of terms: the linears' curve has a rise between each two
    neighbours of :data:`KNOTS`, and curves by rank have a value for each timed rank. The tile is not a linear
    term, so all :data:`TILES` are tried.

    Raises ValueError for no points, or for a time of 0.
    """
    if not points or min(seconds for _, seconds in points) <= 0:
        raise ValueError("a fit needs steps, each of which took more than 0 seconds")
    shapes = [shape for shape, _ in points]
    taken = np.array([seconds for _, seconds in points])
    fits = []
    for tile in TILES:
        terms = _Terms(shapes, tile)
        found = _solve(terms.matrix, taken)
        fits.append((terms, found, np.abs(terms.matrix @ found - taken) / taken))
    most = max(OUTLIER * float(np.median(fits[0][2])), 0.02)
    losses = [float(np.minimum(errors, most).mean()) for _, _, errors in fits]
    losses[0] = losses[0] * WORTH - 1e-6  # another must be better, and not by a rounding
    terms, found, errors = fits[losses.index(min(losses))]
    quality = FitQuality(
        steps=len(points),
        median_error=significant(float(np.median(errors))),
        p90_error=significant(float(np.quantile(errors, 0.9))),
    )
    return terms.costs([float(value) for value in found]), quality


class _Terms:
    """Factors of each coefficient, for every step."""

    def __init__(self, shapes: Sequence[StepShape], tile: int) -> None:
        self._tile = tile
        tokens = [in_tiles(shape.decode_rows + shape.prefill_tokens, tile) for shape in shapes]
        self._knots = [KNOTS[0]]  # those with timings between them and beyond
        for knot in KNOTS[1:]:
            if any(self._knots[-1] < n <= knot for n in tokens) and max(tokens) > knot:
                self._knots.append(knot)
        self._ranks = sorted({rank for shape in shapes for rank, _ in shape.adapters})
        self._columns: dict[str | tuple[str, int], list[float]] = {
            "least": [1.0] * len(shapes),
            "sequence": [shape.sequences for shape in shapes],
            "decode_kv": [shape.decode_kv for shape in shapes],
            "prefill_pair": [shape.prefill_pairs for shape in shapes],
            "lora_step": [bool(shape.adapters) for shape in shapes],
        }
        for low, high in pairwise((*self._knots, float("inf"))):
            self._columns["linears", int(low)] = [min(max(n - low, 0), high - low) for n in tokens]
        for rank in self._ranks:
            of_rank = [[n for r, n in shape.adapters if r == rank] for shape in shapes]
            self._columns["adapter", rank] = [len(counts) for counts in of_rank]
            self._columns["lora_token", rank] = [sum(counts) for counts in of_rank]
        self.matrix: Array = np.array([*self._columns.values()], dtype=float).T

    def costs(self, found: Sequence[float]) -> StepCosts:
        values = dict(zip(self._columns, found, strict=True))
        linears = [(float(self._knots[0]), values["least"])]
        for low, high in pairwise((*self._knots, 2 * self._knots[-1])):
            linears.append((float(high), linears[-1][1] + values["linears", low] * (high - low)))
        fields: dict[str, Any] = {
            field: tuple((float(rank), values[field, rank]) for rank in self._ranks) or NONE
            for field in ("adapter", "lora_token")
        }
        for field in ("sequence", "decode_kv", "prefill_pair", "lora_step"):
            fields[field] = values[field]
        return StepCosts(linears=tuple(linears), tile=self._tile, **fields)


def fit_stage(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit a stage's latency and bandwidth to moves of (bytes, seconds): a line, with errors as in
    :func:`fit_steps`. Raises ValueError without points."""
    if not points:
        raise ValueError("a stage needs moves that were timed")
    nbytes, seconds = np.array(points, dtype=float).T
    latency, per_byte = map(float, _solve(np.array([np.ones_like(nbytes), nbytes]).T, seconds))
    # The moves are so small that their size has no effect: use the fastest move's bytes per second.
    return latency, 1 / per_byte if per_byte > 0 else 100 * float((nbytes / seconds).max())


def _solve(matrix: Array, taken: Array) -> Array:
    """Return the x >= 0 with the smallest Huber loss of (matrix x - taken) / taken."""
    relative = matrix / taken[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale  # columns of like size, for the solver's sake
    weights = np.ones_like(taken)
    found = np.zeros(matrix.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        found, _residual = nnls(relative * root[:, None], root)
        errors = np.abs(relative @ found - 1)
        limit = max(1.5 * float(np.median(errors)), 1e-9)
        weights = np.minimum(1, limit / np.maximum(errors, limit))
    return np.asarray(found / scale)


# From the records of a probe

MAX_SLOWDOWN = 5.0


def fit_moves(costs: StepCosts, overhead: float, probe: Probe, stage: str) -> Stage:
    """Fit a stage to its moves, and to what they did to the steps beside them."""
    sizes: dict[int, list[float]] = defaultdict(list)
    for move in probe.moves:
        if move.stage == stage:
            sizes[move.nbytes].append(move.end - move.start)
    points = [(nbytes, max(statistics.median(times), 1e-9)) for nbytes, times in sizes.items()]
    return Stage(*map(significant, (*fit_stage(points), slowdown(costs, overhead, probe, stage))))


def slowdown(costs: StepCosts, overhead: float, probe: Probe, stage: str) -> float:
    """Return how many times as long steps take while adapters are moved in this stage: from steps that such
    moves overlap, and no others.

    A step of s seconds that is disturbed for o of the w seconds that it takes in the end has
    w = s + o (1 - 1 / slowdown).
    """
    times, extra, disturbed = StepTimes(costs), 0.0, 0.0
    for step in probe.following():
        overlaps = probe.overlaps(step)
        own = overlaps.pop(stage)
        if own and not any(overlaps.values()):
            extra += step.wall - times(step.shape) - overhead
            disturbed += own
    share = extra / disturbed if disturbed else 0.0
    return 1 / (1 - min(max(share, 0.0), 1 - 1 / MAX_SLOWDOWN))
