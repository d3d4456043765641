"""Codes and scales for plain weights: the inverse of :func:`dequantize.codes`, with torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_SPANS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that four bits are tried with; values outside get the nearest code."""


def quantize(format: str, values: Tensor, group: int) -> dict[str, Tensor]:
    """Return the tensors of a :class:`aioengine.kernels.blocks.BlockWeight` for ``values`` [n, k] (float32).

    "int8" and "fp8" (e4m3) have scales alone, which map the largest magnitude of a group to the largest code.
    "int4" has zero points, too, and of several scales those with the smallest squared error. A group is
    ``group`` neighbouring inputs, which must divide ``k``.
    """
    n, k = values.shape
    grouped = values.view(n, k // group, group)
    if format == "int4":
        return _int4(grouped)
    scale = grouped.abs().amax(-1) / _LARGEST[format]
    found = grouped / torch.where(scale == 0, 1.0, scale)[..., None]
    found = found.clamp_(-_LARGEST[format], _LARGEST[format])
    narrow = found.round_().to(torch.int8) if format == "int8" else found.to(torch.float8_e4m3fn)
    return {"data": narrow.view(torch.uint8).view(n, k), "scale": scale}


def _int4(grouped: Tensor) -> dict[str, Tensor]:
    """Unsigned codes, two in a byte. Zero is in every range, so that zero points are codes, too."""
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    best: tuple[Tensor, ...] = ()
    for span in _SPANS:
        scale = (high - low) * (span / 15)
        inverse = 1 / torch.where(scale == 0, 1.0, scale)
        zero = (-low * span * inverse).round_()
        codes = (grouped * inverse[..., None]).round_().add_(zero[..., None]).clamp_(0, 15)
        error = ((codes - zero[..., None]) * scale[..., None] - grouped).square_().sum(-1)
        found = (error, scale, zero, codes)
        if not best:
            best = found
            continue
        better = error < best[0]
        pairs = zip(best, found, strict=True)
        best = tuple(torch.where(better if a.dim() == 2 else better[..., None], b, a) for a, b in pairs)
    _, scale, zero, codes = best
    flat = codes.flatten(1).to(torch.uint8)
    return {"data": flat[:, ::2] | flat[:, 1::2] << 4, "scale": scale, "zero": zero.to(torch.int16)}
