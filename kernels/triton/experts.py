"""The experts' linears as one Triton launch; see :class:`Backend`.

Tiles of rows of one expert are multiplied by that expert's weight, as in MegaBlocks (Gale et al., 2022,
arXiv:2211.15841). The blocks are rules that work everywhere; they have not been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.kernels.blocks import BlockWeight, StackedWeight
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.portable import plain
from aioengine.kernels.triton import blocks
from aioengine.kernels.triton.jit.blocks import expert_blocks_kernel
from aioengine.kernels.triton.jit.experts import expert_kernel, tiles_kernel
from aioengine.kernels.triton.launch import launcher, power_of_two
from aioengine.kernels.weight import PlainWeight, Weight

BLOCK_N, BLOCK_K = 64, {16: 64, 32: 32}
"""Outputs and, by the bits of an element, inputs of a block. float32's products use no tensor cores, and take
registers for their inputs."""
ROWS = (16, 64)
"""Rows of a tile, if an expert has usually no more, and otherwise."""
TILES = 16
"""Tiles that a program cuts."""


def expert_linear(x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """``y[s] = W[expert(s)] x[s]``; see :class:`Backend`."""
    if isinstance(weight, StackedWeight) and _is_covered(weight):
        return _of_blocks(x, weight, bias, plan)
    if not isinstance(weight, PlainWeight):
        return plain.expert_linear(x, weight, bias, plan)
    out = weight.n // plan.experts
    y = x.new_empty(len(x), out)
    if not len(x):
        return y
    block_m = ROWS[_usual(plan, x) > ROWS[0]]
    tiles = _tiles(plan, block_m)
    tensors = x.contiguous(), weight.data, weight.data if bias is None else bias, y, tiles
    sizes = {"BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K[8 * x.element_size()]}
    launch = launcher(expert_kernel, BIAS=bias is not None, **sizes, num_warps=4, num_stages=3)
    launch((-(-out // BLOCK_N), len(tiles), 1), tensors, (weight.k, out))
    return y


def _of_blocks(x: Tensor, weight: StackedWeight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """The same for weights that are ``_is_covered``."""
    first, table = weight.parts[0], weight.addresses
    assert isinstance(first, BlockWeight) and first.scale is not None and table is not None
    out, count = weight.n // plan.experts, len(weight.parts) // plan.experts
    y = x.new_empty(len(x), out)
    if not len(x):
        return y
    config = blocks.config_of(first, _usual(plan, x), x)
    tiles = _tiles(plan, config.block_m, count, first.n)
    kind = {"FORMAT": blocks.FORMATS[first.format], "ZEROS": first.zero is not None}
    config.launcher(expert_blocks_kernel, **kind, BIAS=bias is not None)(
        (-(-first.n // config.block_n), len(tiles), 1),
        (x.contiguous(), table, x if bias is None else bias, y, tiles),
        (first.k, out, first.n, first.group, first.scale.shape[1], first.middle),
    )
    return y


def _is_covered(weight: StackedWeight) -> bool:
    first = weight.parts[0]
    return isinstance(first, BlockWeight) and blocks.covers(first) and weight.addresses is not None


def _usual(plan: ExpertPlan, x: Tensor) -> int:
    """Rows of an expert, if all have as many."""
    return -(-len(x) // plan.experts)


def _tiles(plan: ExpertPlan, most: int, parts: int = 1, outputs: int = 0) -> Tensor:
    """Cut the rows of each expert into tiles of at most ``most``, with each of its ``parts``: [tiles, 4], see
    the kernel. The device does it, so the host only knows how many there may be."""
    rows = len(plan.order)
    count = min(rows, rows // most + plan.experts) * parts
    tiles = torch.empty(count, 4, dtype=torch.int32, device=plan.device)
    launch = launcher(tiles_kernel, ROWS=most, EXPERTS=power_of_two(plan.experts), BLOCK=TILES)
    launch((-(-count // TILES), 1, 1), (plan.ends, tiles), (count, plan.experts, parts, outputs))
    return tiles
