"""Fitting a cost model's coefficients to what was timed: least squares on relative errors, none negative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.costs import FitQuality, Stage, StepCosts, StepShape
from aioengine.lab.extra import needs_extra

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

KNEES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
"""Tokens from which on the linears may cost more than reading their weights."""
ROUNDS = 8
"""Of reweighting: enough for the weights to settle."""


class Timed(NamedTuple):
    """A step that was timed."""

    shape: StepShape
    seconds: float


class StepFit(NamedTuple):
    costs: StepCosts
    quality: FitQuality


_TERMS: dict[str, Callable[[StepShape], float]] = {
    "step": lambda s: 1,
    "decode_row": lambda s: s.decode_rows,
    "prefill_token": lambda s: s.prefill_tokens,
    "sequence": lambda s: s.sequences,
    "decode_kv": lambda s: s.decode_kv,
    "prefill_pair": lambda s: s.prefill_pairs,
    "lora_step": lambda s: s.adapters > 0,
    "adapter": lambda s: s.adapters,
    "adapter_rank": lambda s: s.rank_sum,
    "lora_token": lambda s: s.lora_tokens,
    "lora_token_rank": lambda s: s.lora_token_ranks,
}
"""What each coefficient is multiplied with; that of ``token`` has a floor, and is put beside them."""


def fit_steps(points: Sequence[Timed]) -> StepFit:
    """The coefficients with the smallest relative errors.

    Solved by non-negative least squares (Lawson and Hanson, 1974), reweighted so that outliers count
    linearly (Huber, 1964). The number of tokens up to which the linears take as long as reading their
    weights is not linear: every one of :data:`KNEES` is tried.

    Raises ValueError for no points, or for one that took no time.
    """
    import numpy as np

    if not points or min(point.seconds for point in points) <= 0:
        raise ValueError("a fit needs steps, each of which took more than 0 seconds")
    taken = np.array([point.seconds for point in points])
    shapes = [point.shape for point in points]
    columns = [[term(shape) for shape in shapes] for term in _TERMS.values()]
    tokens = np.array([shape.decode_rows + shape.prefill_tokens for shape in shapes], dtype=float)
    best: tuple[float, int, Any, Any] | None = None
    for knee in KNEES:
        matrix = np.array([*columns, np.maximum(tokens, knee)], dtype=float).T
        found = _solve(matrix, taken)
        errors = np.abs(matrix @ found - taken) / taken
        if best is None or errors.mean() < best[0]:
            best = (float(errors.mean()), knee, found, errors)
    assert best is not None
    _, knee, found, errors = best
    *linear, token = (float(value) for value in found)
    values = dict(zip(_TERMS, linear, strict=True))
    costs = StepCosts(token=token, weights=token * knee, **values)
    quality = FitQuality(
        steps=len(points),
        median_error=float(np.median(errors)),
        p90_error=float(np.quantile(errors, 0.9)),
    )
    return StepFit(costs, quality)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a + b x, neither negative, for points (x, y) with y > 0; errors as in fit_steps."""
    import numpy as np

    x, y = np.array(points, dtype=float).T
    a, b = _solve(np.array([np.ones_like(x), x]).T, y)
    return float(a), float(b)


def fit_stage(points: Sequence[tuple[float, float]]) -> Stage:
    """From moves of (bytes, seconds). Raises ValueError for no points."""
    if not points:
        raise ValueError("a stage needs moves that were timed")
    latency, per_byte = fit_line(points)
    # Moves so small that their size does not show: as fast as the fastest was, all in all.
    fastest = max(nbytes / seconds for nbytes, seconds in points)
    return Stage(latency, 1 / per_byte if per_byte > 0 else 100 * fastest)


def _solve(matrix: Array, taken: Array) -> Array:
    """x >= 0 with the smallest Huber loss of (matrix x - taken) / taken."""
    import numpy as np

    with needs_extra():
        from scipy.optimize import nnls

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
