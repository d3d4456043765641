"""Work on the values of tensors in pieces so small that torch stays in the calling thread.

Otherwise each loader thread would have an OpenMP team, which competes with the model's step for the cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from aioengine.adapters.peft.part import Part, Place
from aioengine.model.buffer import Arena
from aioengine.model.slots.image import serial_copies, serial_pieces


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. aminmax propagates NaN, and costs a fraction of isfinite."""
    return all(math.isfinite(end.item()) for piece in pieces_of(tensor) for end in piece.aminmax())


def pieces_of(tensor: Tensor) -> tuple[Tensor, ...]:
    return serial_pieces(tensor.reshape(-1)) if tensor.numel() else ()


def converted(
    sources: Mapping[Part, Tensor], dtype: torch.dtype, factors: Mapping[Place, float] | None = None
) -> dict[Part, Tensor]:
    """Return each source times the factor of its place (None: 1), computed in float32 and rounded once;
    itself if that changes nothing."""
    changed = {
        part: source
        for part, source in sources.items()
        if source.dtype != dtype or not source.is_contiguous() or (factors and factors[part.place] != 1.0)
    }
    sizes = {part: source.numel() * dtype.itemsize for part, source in changed.items()}
    memory = Arena(max(1, sum(sizes.values())), len(sizes))
    found = dict(sources)
    for part, source in changed.items():
        found[part] = target = memory.take(sizes[part]).view(dtype).view(source.shape)
        factor = torch.tensor(factors[part.place] if factors else 1.0)
        for to, piece in serial_copies(source, target):
            if source.dtype == dtype:
                torch.mul(piece, factor, out=to)
            else:
                to.copy_(piece.float() * factor)
    return found
