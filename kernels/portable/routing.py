"""The choice of experts for each token, in float32 on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.portable.grouped import lora_affine, lora_expand, lora_shrink
from aioengine.kernels.slots import LoRAPool
from aioengine.kernels.weight import Weight


def logits(x: Tensor, weight: Weight, bias: Tensor | None, pool: LoRAPool | None, batch: LoRABatch) -> Tensor:
    """Return the outputs of a small linear with its adapters, all in float32: [T, in] -> [T, out].

    Rounding would change which experts a token goes to.
    """
    x = x.float()
    y = F.linear(x, weight.rows(0, weight.n).float(), None if bias is None else bias.float())
    if pool is not None and batch.segments:
        lora_expand(lora_shrink(x, pool, batch), pool, y, batch)
        lora_affine(y, pool, batch)
    return y


def choose(scores: Tensor, count: int, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """Return weights and numbers of the ``count`` experts with each token's highest ``scores`` [T, experts]
    (float32): both [T, count], weights by softmax over all, ``normalized`` to a sum of 1 over the chosen."""
    weights, chosen = torch.topk(scores.softmax(-1), count, dim=-1)
    if normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen
