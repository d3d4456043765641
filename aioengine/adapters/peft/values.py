"""What the tensors of an adapter's file are, and their values as a slot has them."""

from __future__ import annotations

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
WHOLE_KINDS = HEAD_KINDS + TOKEN_KINDS
"""Kinds of tensors that are no part of a target: each rank needs all of them."""
Matrices = Mapping[Place, tuple[Tensor, Tensor]]
"""A and B of each place."""


class Part(NamedTuple):
    """One tensor's role: ``A``, ``B``, ``bias``, ``magnitude``, ``base`` (the unadapted weight), or one of
    ``WHOLE_KINDS``."""

    place: Place
    kind: str


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
