"""The most likely token of each row of logits, by plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST, _MOST = 64, 512
"""Sizes of blocks."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def argmax(logits: Tensor) -> Tensor:
    """First index of each row's largest value, -1 if that is not finite; see :class:`Backend`."""
    block = min(logits.shape[1] & -logits.shape[1], _MOST)
    if logits.device.type == "cpu" and block >= _LEAST:
        blocks = logits.reshape(len(logits), -1, block)
        if math.isfinite(logits.sum()):
            # Only finite values have a finite sum. Positive ones are in the order of their bits, and torch
            # compares whole numbers ten times faster.
            bits = blocks.view(_BITS[logits.itemsize])
            best = _first_largest(bits)
            top = logits.gather(1, best[:, None])
            if (top > 0).all():
                return best
            if (top < 0).all():  # all are negative: the closest to 0 has the least bits
                return _first_largest(~bits)
        best = _first_largest(blocks)
    else:
        best = logits.argmax(dim=-1)
    top = logits.gather(1, best[:, None])[:, 0]
    return best.masked_fill_(~torch.isfinite(top), -1)


def _first_largest(blocks: Tensor) -> Tensor:
    """Return the first index of each row's largest value by way of the block that it is in: on a CPU torch
    finds the largest value several times faster than where it is."""
    which = blocks.amax(dim=-1).argmax(dim=-1)
    within = blocks[torch.arange(len(blocks)), which].argmax(dim=-1)
    return which * blocks.shape[2] + within
