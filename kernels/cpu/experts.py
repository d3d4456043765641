"""The experts' linears by the CPU library; see :class:`Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.kernels.cpu.packed import PANEL, PackedWeight, is_bf16, pointer
from aioengine.kernels.cpu.shared_library import load, threads
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.portable import plain
from aioengine.kernels.weight import Weight


def expert_linear(x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """``y[s] = W[expert(s)] x[s]``, all experts in one call if they are packed; see :class:`Backend`."""
    out = weight.n // plan.experts
    if not isinstance(weight, PackedWeight) or out % PANEL:
        return plain.expert_linear(x, weight, bias, plan)
    x = x.contiguous()
    y = x.new_empty(len(x), out)
    counts = torch.zeros(plan.experts + 1, dtype=torch.int32)
    for expert, start, stop in plan.groups:
        counts[expert + 1] = stop - start
    begins = counts.cumsum(0, dtype=torch.int32)
    load().aio_linear_experts(
        *(is_bf16(x), x.data_ptr(), weight.data.data_ptr(), pointer(bias), y.data_ptr()),
        *(begins.data_ptr(), plan.experts, out, weight.k, threads()),
    )
    return y
