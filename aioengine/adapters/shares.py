"""A rank's share of an adapter that has been read whole.

Every rank reads the file: the digest is of all of it, and NaN anywhere must make all ranks refuse it. The
operating system keeps it in memory meanwhile, so the disk is read once. The share alone is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from aioengine.adapters.peft import PackedAdapter
from aioengine.model.slot_layout import SlotLayout

Key = tuple[int, str]


class AdapterPart(NamedTuple):
    """A part of a :class:`PackedAdapter`, as views of it."""

    name: str
    path: str
    rank: int
    """Of the whole adapter."""
    digest: str
    tensors: Mapping[Key, tuple[Tensor, Tensor]]
    magnitudes: Mapping[Key, Tensor]
    biases: Mapping[Key, Tensor]
    in_order: None = None
    shape: None = None


def computed_outputs(layout: SlotLayout, adapter: PackedAdapter) -> AdapterPart:
    """The rows of B, whole As, and the rest that the outputs which the rank computes depend on."""
    rows = {key: layout.share(key[1]).outputs for key in adapter.tensors}
    return AdapterPart(
        adapter.name,
        adapter.path,
        adapter.rank,
        adapter.digest,
        {key: (a, b[rows[key]]) for key, (a, b) in adapter.tensors.items()},
        {key: magnitude[rows[key]] for key, magnitude in adapter.magnitudes.items()},
        {key: bias[rows[key]] for key, bias in adapter.biases.items()},
    )


def held_matrices(layout: SlotLayout, adapter: PackedAdapter) -> AdapterPart:
    """The parts of A and B that the rank's slots hold."""
    tensors = {}
    for key, (a, b) in adapter.tensors.items():
        share = layout.share(key[1])
        tensors[key] = a[share.a], b[share.b]
    return AdapterPart(adapter.name, adapter.path, adapter.rank, adapter.digest, tensors, {}, {})
