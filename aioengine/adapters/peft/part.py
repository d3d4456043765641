"""What the tensors of an adapter's file are."""

from __future__ import annotations

from typing import NamedTuple

Place = tuple[int, str]
"""(layer, module), embeddings and heads under ``NO_LAYER``."""
HEAD_KINDS = ("head", "head_bias")
TOKEN_KINDS = ("tokens", "saved")
"""Kinds of tensors: rows of ``trainable_token_indices``, and whole matrices."""


class Part(NamedTuple):
    """One tensor's role: ``A``, ``B``, ``bias``, ``magnitude``, ``base`` (the unadapted weight), or one of
    ``HEAD_KINDS`` and ``TOKEN_KINDS``."""

    place: Place
    kind: str

    @property
    def is_whole(self) -> bool:
        """Whether each rank needs all of it: it is not a part of a target."""
        return self.kind in HEAD_KINDS or self.kind in TOKEN_KINDS
