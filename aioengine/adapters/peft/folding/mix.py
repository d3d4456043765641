"""Scaled adapters, and weighted sums of adapters.

A scale is PEFT's ``set_scale``: all that LoRA adds is multiplied by it. DoRA's norms are of the scaled
weights, and what is no LoRA (a classification head, trained tokens) stays as it is.

A sum is that of PEFT's ``add_weighted_adapter(combination_type="cat")``: the sum of w_i B_i A_i is B A, where
A has the A_i one below the other and B has the w_i B_i side by side. So a mix is one adapter, and its rank is
the sum of their ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from aioengine.adapters.peft.folder import invalid
from aioengine.adapters.peft.pack import PackedAdapter
from aioengine.adapters.peft.values import Matrices, Place
from aioengine.errors import AdapterChanged, AdapterTooLarge
from aioengine.model.slots.layout import MAX_RANK, SlotLayout
from aioengine.step import MixPart


def add_up(slot: SlotLayout, parts: Sequence[tuple[MixPart, PackedAdapter]]) -> PackedAdapter:
    """Add up adapters that were read for ``slot`` and have their scalings in B, or scale the only one.

    Raises:
        AdapterInvalid: one of several has parts that cannot be added up.
        AdapterTooLarge: their ranks together are larger than ``MAX_RANK``.
        AdapterChanged: the files of one have changed since it was loaded.
    """
    found = [packed for _, packed in parts]
    digests = [packed.digest for packed in found]
    # Of several ranks only the first knows it.
    digest = _digest([part for part, _ in parts], digests) if all(digests) else ""
    biases: dict[Place, Tensor] = {}
    for part, packed in parts:
        for place, bias in packed.biases.items():
            biases[place] = biases.get(place, 0) + bias * part.weight
    (first, only), *others = parts
    mix = replace(
        only,
        find_digest=lambda: digest,
        version=";".join(packed.version for packed in found),
        tensors=_scaled(only.tensors, first.weight),
        computed=_scaled(only.computed, first.weight),
        biases=biases,
    )
    if not others:
        return mix
    for part, packed in parts:
        _check(part, packed)
    scaled = [mix.tensors, *(_scaled(packed.tensors, part.weight) for part, packed in others)]
    tensors: dict[Place, tuple[Tensor, Tensor]] = {}
    for place in dict.fromkeys(place for pairs in scaled for place in pairs):
        pairs = [_filled(slot, place[1], *own[place]) for own in scaled if place in own]
        b = torch.cat([b for _, b in pairs], dim=1)
        if b.shape[1] > MAX_RANK:
            ranks = " + ".join(str(b.shape[1]) for _, b in pairs)
            why = f"{place[1]} of layer {place[0]} has rank {ranks}, more than {MAX_RANK}: mix fewer"
            raise AdapterTooLarge(why, name="")
        tensors[place] = torch.cat([a for a, _ in pairs]), b
    return replace(mix, tensors=tensors, rank=max(b.shape[1] for _, b in tensors.values()), pooling=None)


def _scaled(pairs: Matrices, weight: float) -> Matrices:
    return {place: (a, (b.float() * weight).to(b.dtype)) for place, (a, b) in pairs.items()}


def _filled(layout: SlotLayout, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Fill up A and B with zeros where each tensor-parallel rank holds every n-th row of A, so that all ranks
    hold as many rows of this part, and the next part begins at the first rank."""
    ways = layout.share(module).a[0].step or 1
    rank = -(-b.shape[1] // ways) * ways
    return pad(a, (0, 0, 0, rank // ways - len(a))), pad(b, (0, rank - b.shape[1]))


def _check(part: MixPart, packed: PackedAdapter) -> None:
    kinds = (
        ("DoRA's magnitudes, which are of the weights with this adapter alone", packed.magnitudes),
        ("invocation tokens", packed.invocation),
        ("a classification head", packed.head is not None),
        ("trained tokens", packed.tokens is not None),
    )
    if more := [what for what, has in kinds if has]:
        invalid(
            f"{part.name!r} has {' and '.join(more)}, and so it can be scaled but not mixed with others: ask "
            "for it alone"
        )


def _digest(parts: Sequence[MixPart], digests: Sequence[str]) -> str:
    """Return the digest of a mix whose parts' contents have these digests. Raises AdapterChanged if a part
    has another content than it must have."""
    sha = hashlib.sha256()
    for part, digest in zip(parts, digests, strict=True):
        if part.digest not in ("", digest):
            raise AdapterChanged(
                "its files have changed since it was loaded: load it with replace=True",
                name=part.name,
                path=part.path,
            )
        sha.update(f"{digest}*{part.weight!r};".encode())
    return sha.hexdigest()
