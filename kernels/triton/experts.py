"""The experts' linears as one Triton launch; see :class:`Backend`.

Tiles of rows of one expert are multiplied by that expert's weight, as in MegaBlocks (Gale et al., 2022,
arXiv:2211.15841). The blocks are rules that work everywhere; they have not been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.portable import plain
from aioengine.kernels.triton.jit.experts import expert_kernel
from aioengine.kernels.triton.launch import on
from aioengine.kernels.weight import PlainWeight, Weight

BLOCK_N, BLOCK_K = 64, 64
ROWS = (16, 64)
"""Rows of a tile, if the expert that has most has no more, and otherwise."""


def expert_linear(x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """``y[s] = W[expert(s)] x[s]``; see :class:`Backend`."""
    if not isinstance(weight, PlainWeight):
        return plain.expert_linear(x, weight, bias, plan)
    out = weight.n // plan.experts
    y = x.new_empty(len(x), out)
    if not plan.groups:
        return y
    longest = max(stop - start for _, start, stop in plan.groups)
    block_m = ROWS[longest > ROWS[0]]
    tiles = torch.tensor(
        [
            (expert, first, min(block_m, stop - first))
            for expert, start, stop in plan.groups
            for first in range(start, stop, block_m)
        ],
        dtype=torch.int32,
        pin_memory=x.device.type == "cuda",
    )
    with on(x.device):
        expert_kernel[-(-out // BLOCK_N), len(tiles)](
            *(x.contiguous(), weight.data, weight.data if bias is None else bias, y),
            *(tiles.to(x.device, non_blocking=True), weight.k, out),
            BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=3,
        )
    return y
