"""The experts' linears by the CPU library; see :class:`Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.kernels.cpu.blocks import PackedBlocks
from aioengine.kernels.cpu.packed import PANEL, PackedWeight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.portable import plain
from aioengine.kernels.weight import Weight


def expert_linear(x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """``y[s] = W[expert(s)] x[s]``, all experts in one call if they are packed; see :class:`Backend`."""
    out = weight.n // plan.experts
    if not isinstance(weight, (PackedWeight, QuantizedWeight, PackedBlocks)) or out % PANEL:
        return plain.expert_linear(x, weight, bias, plan)
    x = x.contiguous()
    counts = torch.zeros(plan.experts + 1, dtype=torch.int32)
    for expert, start, stop in plan.groups:
        counts[expert + 1] = stop - start
    return weight.experts(x, bias, counts.cumsum(0, dtype=torch.int32))
