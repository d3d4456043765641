"""Gain and shift that DoRA and ``lora_bias`` apply to a linear's outputs, computed once when an adapter is
loaded.

DoRA (Liu et al., 2024, https://arxiv.org/abs/2402.09353) gives every row of the adapted weight a trained
length m: ``y = bias + m / |W + BA| * (W + BA) x``, where |.| is the norm of each row. With
``scale = m / |W + BA|`` and y the output of the linear with LoRA and the base bias b, that is
``y + (scale - 1) * y + (1 - scale) * b``: a gain and a shift for each output, which is all that a slot holds.
The bias that ``lora_bias`` trains is one more shift. The slot stores ``scale - 1``, because trained scales
are close to 1 and bfloat16 would round the difference away.

The norm is over whole rows. Under tensor parallelism a rank has the rows of the outputs that it computes. But
where a linear is split over its inputs, it has a part of each row. The ranks then add up their sums of
squares, and gain and shift apply once, after the outputs' parts have been added. The outputs of experts are
added up later; there each rank applies the gain to its part, and one rank the shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.adapters.peft.folder import invalid
from aioengine.adapters.peft.pack import PackedAdapter
from aioengine.adapters.peft.values import Place
from aioengine.model.linear import WeightRows
from aioengine.model.slots.image import is_finite

BaseWeights = Callable[[int, str], tuple[WeightRows, Tensor | None]]
"""``weights(layer, module)``: the base model's weight [out, in] and bias [out], or the rank's shares of
these."""

_CPU_ELEMENTS, _CUDA_ELEMENTS = 1 << 18, 1 << 22
"""Of a tile: what a processor's cache has room for; on a GPU counted in
:mod:`aioengine.model.cuda.working_memory`."""


class Rows(NamedTuple):
    """The rows of an adapted weight, on the CPU."""

    squares: Tensor
    """Sum of squares of each row [out], in float32."""
    bias: Tensor | None
    """The base model's bias [out], in float32."""


def rows_of(adapter: PackedAdapter, weights: BaseWeights, keys: Iterable[Place]) -> dict[Place, Rows]:
    """Compute the rows of each (layer, module), or the part of them that ``weights`` has.

    Piece by piece, since a quantized weight is expanded for it. Where the weights are on a GPU, the host
    waits once, for all results together.
    """
    totals: dict[Place, Tensor] = {}
    biases: dict[Place, Tensor] = {}
    for key in keys:
        weight, bias = weights(*key)
        totals[key] = squares(weight, *adapter.computed[key])
        if bias is not None:
            biases[key] = bias.float()
    parts = [*totals.values(), *biases.values()]
    if any(part.is_cuda for part in parts):
        parts = list(torch.cat(parts).cpu().split_with_sizes([len(part) for part in parts]))
    totals = dict(zip(totals, parts, strict=False))
    biases = dict(zip(biases, parts[len(totals) :], strict=True))
    return {key: Rows(total, biases.get(key)) for key, total in totals.items()}


def output_affine(
    adapter: PackedAdapter, rows: Mapping[Place, Rows], dtype: torch.dtype
) -> dict[Place, Tensor]:
    """Compute gain and shift [2, out] in ``dtype`` on the CPU, for each (layer, module) with DoRA, of which
    ``rows`` has the adapted weight's, or with a bias.

    Raises :class:`AdapterInvalid` if one is not finite in ``dtype``.
    """
    result = {}
    for key in sorted({*adapter.magnitudes, *adapter.biases}):
        magnitude, bias = adapter.magnitudes.get(key), adapter.biases.get(key)
        gain, shift = torch.zeros(2, *next(x.shape for x in (magnitude, bias) if x is not None))
        if magnitude is not None:
            squared, base_bias = rows[key]
            # Not sqrt: MKL does that with a team of threads.
            gain = magnitude.float() * squared.rsqrt() - 1
            if base_bias is not None:
                shift -= gain * base_bias
        if bias is not None:
            shift += bias.float()
        result[key] = torch.stack([gain, shift]).to(dtype)
        if not is_finite(result[key]):
            layer, module = key
            where = module if layer < 0 else f"{module} of layer {layer}"
            invalid(
                f"the DoRA scale or the bias of {where} is not finite in {dtype}: a row of the adapted "
                "weight is zero (was it trained on another base model?), or lora_dtype must be float32"
            )
    return result


def squares(weight: WeightRows, a: Tensor, b: Tensor) -> Tensor:
    """Compute the sum of squares of each row of ``weight + b @ a``: [out] in float32, on the weight's device.

    ``weight`` [out, in], ``a`` [r, in], ``b`` [out, r]. With w and b a row of each, the square is
    ``w.w + 2 b.(A w) + b.(A A^T) b``, so no temporary of the weight's size is needed: the weight is read in
    tiles.
    """
    total = torch.empty(0)
    for number, (first, piece) in enumerate(weight.pieces()):
        if number == 0:
            a, b = (x.to(piece.device, non_blocking=True).float() for x in (a, b))
            total = (_products(b, _products(a, a)) * b).sum(1)
        height, width = piece.shape
        row, column = (0, first) if weight.turned else (first, 0)
        inputs, own, rest = a[:, column : column + width], b[row : row + height], total[row : row + height]
        size = max(1, (_CUDA_ELEMENTS if piece.is_cuda else _CPU_ELEMENTS) // weight.weight.k)
        for begin in range(0, width if weight.turned else height, size):
            part, whole = slice(begin, begin + size), slice(None)
            rows, columns = (whole, part) if weight.turned else (part, whole)
            tile = piece[rows, columns].float()
            rest[rows] += 2 * (_products(tile, inputs[:, columns]) * own[rows]).sum(1) + tile.square().sum(1)
    return total.clamp_(min=0)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` for ``x`` [n, k] and ``y`` [m, k] with a small m.

    On a CPU it uses matrix-vector products, which BLAS computes in the calling thread. A matrix product would
    start a team of OpenMP threads that competes with the model's step for the cores.
    """
    if x.is_cuda:
        return x @ y.T
    return torch.stack([torch.mv(x, row) for row in y], dim=1)
