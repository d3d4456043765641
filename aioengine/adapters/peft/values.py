"""What the tensors of an adapter's file are, and work on their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.model.slots.image import multiply

Place = tuple[int, str]
"""(layer, module), embeddings and heads under ``NO_LAYER``."""
HEAD_KINDS = ("head", "head_bias")
TOKEN_KINDS = ("tokens", "saved")
"""Kinds of tensors: rows of ``trainable_token_indices``, and whole matrices."""
Matrices = Mapping[Place, tuple[Tensor, Tensor]]
"""A and B of each place."""


class Part(NamedTuple):
    """One tensor's role: ``A``, ``B``, ``bias``, ``magnitude``, ``base`` (the unadapted weight), or one of
    ``HEAD_KINDS`` and ``TOKEN_KINDS``."""

    place: Place
    kind: str

    @property
    def is_whole(self) -> bool:
        """Whether each rank needs all of it: it is not a part of a target."""
        return self.kind in HEAD_KINDS or self.kind in TOKEN_KINDS


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. A sum has one if a value is one, and costs a fraction of
    isfinite; if only the sum is too large, each value is looked at."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def converted(source: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Return ``source`` times ``factor``, computed in float32 and rounded once; itself if that changes
    nothing."""
    if factor == 1.0:
        return source.to(dtype)
    target = torch.empty(source.shape, dtype=dtype)
    multiply(source, torch.tensor(factor), target)
    return target


def scaled(pairs: Matrices, scalings: Mapping[Place, float], dtype: torch.dtype) -> Matrices:
    """Return A and B as an image has them: in ``dtype``, and B times the scaling."""
    return {
        place: (converted(a, dtype), converted(b, dtype, scalings.get(place, 1.0)))
        for place, (a, b) in pairs.items()
    }
