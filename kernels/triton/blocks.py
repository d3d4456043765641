"""Products with the weights of quantized checkpoints (GPTQ, AWQ, compressed-tensors, float8, MXFP4), as one
Triton launch each; see :class:`Backend`.

Weights stay as they are stored, and activations are not quantized: so a token's bits do not depend on how
many a step has. Where the inputs of a group are neighbours, codes are multiplied and their sums scaled, so a
GPU differs from a CPU, which rounds each weight to the compute dtype, by that rounding. That reads a quarter
or half of the bytes of 16-bit weights. The products themselves are of 16 bits, as in Marlin (Frantar et al.,
2024, arXiv:2408.11743), without its order of weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from aioengine.kernels.blocks import BlockWeight, StackedWeight
from aioengine.kernels.triton.jit.blocks import FP8, INT4, INT8, MXFP4, block_linear_kernel
from aioengine.kernels.triton.launch import Launcher, launcher
from aioengine.kernels.weight import PlainWeight, Weight

FORMATS = {"int4": INT4.value, "int8": INT8.value, "fp8": FP8.value, "mxfp4": MXFP4.value}
"""Formats that the kernel knows, by name."""
_SMALLEST_GROUP = 32
"""Inputs that a product is made of at least: a tensor core takes 16, and int4 has two in a byte."""
FEW_ROWS = 16


class BlockConfig(NamedTuple):
    """Sizes that a product is cut into."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def blocks(self) -> dict[str, int]:
        """Return the kernels' constants for the blocks."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def launcher(self, kernel: Any, **constants: int) -> Launcher:
        """Return the launcher for products that are cut so."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return launcher(kernel, **constants, **self.blocks(), **options)


def default_blocks(rows: int, n: int, group: int, bits: int, *, ordered: bool = False) -> BlockConfig:
    """Choose blocks for ``rows`` tokens, ``n`` outputs and groups of ``group`` inputs; ``bits`` are those of
    an activation.

    Few rows wait for memory: programs enough for all multiprocessors, and many blocks of weights in flight.
    """
    if ordered:  # every weight has a scale in registers
        return BlockConfig(FEW_ROWS if rows <= FEW_ROWS else 64, 32, 32, 4, 3)
    block_k = min(128 if bits == 16 else 32, group & -group)
    if rows <= FEW_ROWS:
        return BlockConfig(FEW_ROWS, 64 if n >= 8192 else 32, block_k, 4, 5 if bits == 16 else 3)
    return BlockConfig(64, 128 if bits == 16 else 64, min(64, block_k), 8, 3)


def covers(weight: BlockWeight) -> bool:
    """Whether the kernel computes products with this weight. Others, for example those of GGUF files, are
    expanded by torch."""
    if weight.format not in FORMATS:
        return False
    return weight.group_of is not None or weight.group % _SMALLEST_GROUP == 0 or weight.group >= weight.k


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``; see :class:`Backend`."""
    if isinstance(weight, PlainWeight):
        return weight.linear(x, bias)
    parts = weight.parts if isinstance(weight, StackedWeight) else [weight]
    if not any(isinstance(part, BlockWeight) and covers(part) for part in parts):
        return weight.linear(x, bias)
    y, begin = x.new_empty(len(x), weight.n), 0
    for part in parts:
        end = begin + part.n
        own = None if bias is None else bias[begin:end]
        if isinstance(part, BlockWeight) and covers(part):
            if len(x):
                multiply(x, part, own, y[:, begin:end], config_of(part, len(x), x))
        else:
            y[:, begin:end] = part.linear(x, own)
        begin = end
    return y


def config_of(weight: BlockWeight, rows: int, x: Tensor) -> BlockConfig:
    """Choose blocks for a weight and ``rows`` tokens of the dtype of ``x``."""
    ordered = weight.group_of is not None
    group = weight.k if ordered or weight.group >= weight.k else weight.group
    return default_blocks(rows, weight.n, _whole(group), _bits(x), ordered=ordered)


def _whole(group: int) -> int:
    """Return a multiple of all block sizes for a group that is a whole row: blocks beyond it are masked."""
    return group if group % _SMALLEST_GROUP == 0 else 128


def _bits(x: Tensor) -> int:
    return 8 * x.element_size()


def multiply(x: Tensor, weight: BlockWeight, bias: Tensor | None, y: Tensor, config: BlockConfig) -> None:
    """Write ``x W^T + bias`` to ``y`` [T, n], whose columns adjoin, with blocks of the caller's choice."""
    assert weight.scale is not None and x.dtype == weight.dtype
    data, ordered = weight.data, weight.group_of is not None
    groups = weight.scale.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    kind = {"FORMAT": FORMATS[weight.format], "ZEROS": weight.zero is not None, "ORDERED": ordered}
    config.launcher(block_linear_kernel, **kind, BIAS=bias is not None)(
        (-(-len(x) // config.block_m), -(-weight.n // config.block_n), 1),
        (
            *(x, data, weight.scale, data if weight.zero is None else weight.zero),
            *(data if weight.group_of is None else weight.group_of, x if bias is None else bias, y),
        ),
        (
            *(len(x), weight.n, weight.k, x.stride(0), y.stride(0)),
            *(weight.k if ordered else weight.group or weight.k, groups, weight.middle),
        ),
    )
