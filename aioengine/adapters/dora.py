"""What DoRA and ``lora_bias`` do to a linear's outputs, worked out once when an adapter is loaded.

DoRA (Liu et al., 2024, https://arxiv.org/abs/2402.09353) gives every row of the adapted weight a trained
length m: ``y = bias + m / |W + BA| * (W + BA) x``, where |.| is the norm of each row. With
``scale = m / |W + BA|`` and y the output of the linear with LoRA and the base bias b, that is
``y + (scale - 1) * y + (1 - scale) * b``: a gain and a shift for each output, which is all that a slot holds.
The bias that ``lora_bias`` trains is one more shift. The gain is kept less 1, because trained scales are
close to 1, where a bfloat16 would round it away.

The norm is over whole rows: under tensor parallelism it has to come from the full W, B and A, and where
a linear is split over its inputs, gain and shift apply once, after the parts have been added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from aioengine.errors import AdapterInvalid
from aioengine.model.slot_image import SERIAL_ELEMENTS

BaseWeights = Callable[[int, str], tuple[Tensor, Tensor | None]]
"""``weights(layer, module)``: the base model's weight [out, in] and bias [out]."""

_CUDA_ELEMENTS = 1 << 24


class OutputAdapter(Protocol):
    """What :func:`output_affine` reads of an :class:`aioengine.adapters.peft.PackedAdapter`."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def tensors(self) -> Mapping[tuple[int, str], tuple[Tensor, Tensor]]: ...

    @property
    def magnitudes(self) -> Mapping[tuple[int, str], Tensor]: ...

    @property
    def biases(self) -> Mapping[tuple[int, str], Tensor]: ...


def output_affine(
    adapter: OutputAdapter, weights: BaseWeights, dtype: torch.dtype
) -> dict[tuple[int, str], Tensor]:
    """Gain and shift [2, out] in ``dtype`` on the CPU, for each (layer, module) with DoRA or a bias.

    Raises :class:`AdapterInvalid` if one is not finite in ``dtype``.
    """
    result = {}
    for key in sorted({*adapter.magnitudes, *adapter.biases}):
        magnitude, bias = adapter.magnitudes.get(key), adapter.biases.get(key)
        n_out = adapter.tensors[key][1].shape[0]
        gain, shift = torch.zeros(n_out), torch.zeros(n_out)
        if magnitude is not None:
            weight, base_bias = weights(*key)
            a, b = adapter.tensors[key]
            gain = magnitude.float() * inverse_norms(weight, a, b).cpu() - 1
            if base_bias is not None:
                shift -= gain * base_bias.float().cpu()
        if bias is not None:
            shift += bias.float()
        result[key] = torch.stack([gain, shift]).to(dtype)
        if not all(math.isfinite(extreme.item()) for extreme in result[key].aminmax()):
            layer, module = key
            where = module if layer < 0 else f"{module} of layer {layer}"
            raise AdapterInvalid(
                f"the DoRA scale or the bias of {where} is not finite in {dtype}: a row of the adapted "
                "weight is zero (was it trained on another base model?), or lora_dtype has to be float32",
                name=adapter.name,
                path=adapter.path,
            )
    return result


def inverse_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """1 / the Euclidean norm of each row of ``weight + b @ a``: [out] in float32, on the weight's device.

    ``weight`` [out, in], ``a`` [r, in], ``b`` [out, r]. With w and b a row of each, the square is
    ``w.w + 2 b.(A w) + b.(A A^T) b``, so that nothing of the weight's size is built: the weight is gone
    through in tiles.
    """
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
    squares = (_products(b, _products(a, a)) * b).sum(1)
    for rows, columns in _tiles(weight):
        tile = weight[rows, columns].float()
        squares[rows] += 2 * (_products(tile, a[:, columns]) * b[rows]).sum(1) + tile.square().sum(1)
    return squares.clamp_(min=0).rsqrt_()  # not sqrt: MKL does that with a team of threads


def _products(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` for ``x`` [n, k] and ``y`` [m, k] with a small m.

    On a CPU as products with vectors, which BLAS does in the calling thread. For a product of matrices it
    takes a team of OpenMP threads, which would fight for the cores with the model's step.
    """
    if x.is_cuda:
        return x @ y.T
    return torch.stack([torch.mv(x, row) for row in y], dim=1)


def _tiles(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Covers a matrix in the order of its memory (an embedding comes transposed)."""
    n_out, n_in = weight.shape
    size = _CUDA_ELEMENTS if weight.is_cuda else SERIAL_ELEMENTS
    if weight.stride(1) == 1:
        width = min(n_in, size)
        height = max(1, size // width)
    else:
        height = min(n_out, size)
        width = max(1, size // height)
    for row in range(0, n_out, height):
        for column in range(0, n_in, width):
            yield slice(row, row + height), slice(column, column + width)
