"""Weighted sums of adapters, as PEFT's ``add_weighted_adapter(combination_type="cat")`` makes them.

The sum of w_i B_i A_i is B A, where A has the A_i one below the other and B has the w_i B_i side by side. So
a mix is one adapter, and its rank is the sum of their ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from aioengine.adapters.peft.pack import SlotOrder
from aioengine.adapters.peft.read import PackedAdapter
from aioengine.errors import AdapterInvalid, AdapterLoadError, AdapterTooLarge
from aioengine.step import MixPart


def add_up(
    name: str, path: str, order: SlotOrder, parts: Sequence[tuple[MixPart, PackedAdapter]]
) -> PackedAdapter:
    """Add up adapters that were read for ``order``.

    Raises:
        AdapterInvalid: one of them has more than A and B.
        AdapterTooLarge: their ranks together are larger than the slot's.
        AdapterLoadError: the files of one have changed since it was loaded.
    """
    digest = hashlib.sha256()
    for part, packed in parts:
        _check(name, path, part, packed)
        digest.update(f"{packed.digest}*{part.weight!r};".encode())
    tensors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for place in dict.fromkeys(place for _, packed in parts for place in packed.tensors):
        pairs = [(part.weight, *packed.tensors[place]) for part, packed in parts if place in packed.tensors]
        a = torch.cat([a for _, a, _ in pairs])
        b = torch.cat([(b.float() * weight).to(b.dtype) for weight, _, b in pairs], dim=1)
        if len(a) > order.layout.max_rank:
            ranks = " + ".join(str(len(a)) for _, a, _ in pairs)
            raise AdapterTooLarge(
                f"{place[1]} of layer {place[0]} has rank {ranks}, more than "
                f"max_lora_rank={order.layout.max_rank}: "
                "raise it, or mix fewer",
                name=name,
                path=path,
            )
        tensors[place] = a, b
    return PackedAdapter(
        name=name,
        path=path,
        rank=max(len(a) for a, _ in tensors.values()),
        digest=digest.hexdigest(),
        nbytes=sum(a.nbytes + b.nbytes for a, b in tensors.values()),
        tensors=tensors,
        version=";".join(packed.version for _, packed in parts),
    )


def _check(name: str, path: str, part: MixPart, packed: PackedAdapter) -> None:
    if part.digest and packed.digest != part.digest:
        raise AdapterLoadError(
            f"the files of {part.name!r} ({part.path}) have changed since it was loaded: load it with "
            "replace=True",
            name=name,
            path=path,
        )
    more = [
        what
        for what, has in (
            ("DoRA's magnitudes", packed.magnitudes),
            ("biases", packed.biases),
            ("invocation tokens", packed.invocation),
            ("a classification head", packed.head is not None),
            ("trained tokens", packed.tokens is not None),
        )
        if has
    ]
    if more:
        raise AdapterInvalid(
            f"{part.name!r} has {' and '.join(more)}, which cannot be mixed or scaled: merge it with PEFT's "
            "add_weighted_adapter, or ask for it alone",
            name=name,
            path=path,
        )
