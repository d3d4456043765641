"""Norms of queries and keys over the heads of all ranks together."""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.kernels import HeadNorms
from aioengine.model.parallel.group import Group


def norm_heads(qkv: Tensor, norms: HeadNorms, group: Group) -> None:
    """Norm queries and keys in place; ``qkv`` [T, H + 2 K, d] has this rank's heads, as ``norms`` has.

    The ranks add up their sums of squares. Heads that several ranks have count several times, all of them
    equally often, so the mean is the same.
    """
    q, k = (len(weight) // qkv.shape[2] for weight in (norms.q, norms.k))
    parts = [(qkv[:, :q], norms.q), (qkv[:, q : q + k], norms.k)]
    squares = torch.stack([x.float().square().sum((1, 2)) for x, _ in parts])
    for (x, weight), total in zip(parts, group.all_reduce(squares), strict=True):
        mean = total / (len(weight) * group.shard.size)
        normed = x.flatten(1).float() * torch.rsqrt(mean + norms.eps)[:, None]
        if norms.offset is None:
            normed = normed.to(x.dtype).float() * weight.float()
        else:
            normed *= norms.offset + weight.float()
        x.copy_(normed.view_as(x))
