"""Random adapters, put straight into slots."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from aioengine.model.buffer import Allocate, pageable
from aioengine.model.parallel.group import take
from aioengine.model.slots.image import AdapterImage, build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.slots.tokens import TrainedTokens


def random_image(
    layout: SlotLayout,
    rank: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    affine: bool = False,
    allocate: Allocate = pageable,
    tokens: TrainedTokens | None = None,
) -> AdapterImage:
    """Of ``rank`` in every module of the slots; with ``affine``, all outputs are scaled and shifted."""

    def randn(*shape: int) -> Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).to(dtype)

    tensors, gains = {}, {}
    for key, place in layout.places.items():
        share, (n_in, n_out) = layout.share(key[1]), layout.spec.linear(key[1])
        tensors[key] = randn(rank, n_in)[share.a], take(randn(n_out, rank), share.b)
        if affine:
            gains[key] = randn(2, place.num_outputs)
    adapter = SimpleNamespace(rank=rank, digest="", tensors=tensors)
    return build_image(layout, adapter, gains, dtype, allocate, tokens=tokens)


def fill_slot(
    slots: LoRASlots, slot: int, rank: int, generator: torch.Generator, *, affine: bool = False
) -> None:
    """Also where the slots are int8."""
    slots.write(slot, random_image(slots.layout, rank, generator, slots.memory.dtype, affine=affine))
