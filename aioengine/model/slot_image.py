"""An adapter in CPU memory, in the order of a slot: putting it into one takes hardly more than a memcpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.model.buffer import Buffer
from aioengine.model.slot_layout import SlotLayout

SERIAL_ELEMENTS = 32_000
"""torch works on up to so many elements in the calling thread (it goes parallel from 32768)."""

_WIDE = {16: torch.complex128, 8: torch.int64, 4: torch.int32}


class Adapter(Protocol):
    """What :func:`build_image` reads of an :class:`aioengine.adapters.peft.PackedAdapter`."""

    @property
    def rank(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def tensors(self) -> Mapping[tuple[int, str], tuple[Tensor, Tensor]]: ...


class Block(NamedTuple):
    """``rows`` rows of ``width`` elements, ``pitch`` apart in the slot and adjoining in the image."""

    slot: int
    """Offset in the slot, in elements."""
    image: int
    """Offset in the image."""
    rows: int
    width: int
    pitch: int


class Piece(NamedTuple):
    """A part of a block that torch copies in the calling thread; numbers as there, in elements of ``dtype``.

    The elements are the widest that divide the memory so, because what torch does costs by the element:
    narrow rows, those of B in a slot of larger rank, get down to one or two.
    """

    dtype: torch.dtype
    slot: int
    image: int
    rows: int
    width: int
    pitch: int


@dataclass(frozen=True, slots=True, eq=False)
class AdapterImage:
    """The elements that an adapter puts into a slot, in one buffer (page-locked if asked for)."""

    rank: int
    digest: str
    layout: SlotLayout
    data: Tensor
    """[elements]"""
    blocks: tuple[Block, ...]
    """In the order of the slot; an adapter of the slot's rank in all modules is one block."""
    pieces: tuple[Piece, ...]
    sources: list[Tensor]
    """The image's share of each piece: [rows, width]."""
    extent: Mapping[int, int]
    """Offset in the slot -> row width, for every matrix that is covered: what a later write must zero."""
    has_affine: bool
    """Whether an output is scaled or shifted (DoRA, ``lora_bias``)."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class _Part(NamedTuple):
    slot: int
    pitch: int
    values: Tensor
    """[rows, width]"""


def build_image(
    layout: SlotLayout,
    adapter: Adapter,
    affine: Mapping[tuple[int, str], Tensor],
    dtype: torch.dtype,
    *,
    pin_memory: bool = False,
) -> AdapterImage:
    """Copies an adapter into an image of ``dtype``, in the calling thread alone.

    ``affine`` gives gain and shift [2, out] of the modules that have them. Raises :class:`ConfigError`
    if the adapter does not fit the layout.
    """
    _check(layout, adapter, affine)
    parts: list[_Part] = []
    for key, (a, b) in adapter.tensors.items():
        place = layout.places[key]
        parts.append(_Part(place.a, place.shape.in_features, a))
        parts.append(_Part(place.b, layout.max_rank, b))
    for key, values in affine.items():
        parts.append(_Part(layout.places[key].affine, values.shape[1], values))
    parts.sort(key=lambda part: part.slot)

    elements = sum(part.values.numel() for part in parts)
    if pin_memory:
        data = torch.empty(elements, dtype=dtype, pin_memory=True)
    else:
        data = Buffer(elements * dtype.itemsize).tensor.view(dtype)
    shares = data.split_with_sizes([part.values.numel() for part in parts])
    torch._foreach_copy_(
        [piece for share in shares for piece in serial_pieces(share)],
        [piece for part in parts for piece in serial_pieces(part.values.reshape(-1))],
    )
    blocks = tuple(_blocks(parts))
    pieces = tuple(_pieces(blocks, data, layout.elements))
    wide = {piece.dtype: data.view(piece.dtype) for piece in pieces}
    return AdapterImage(
        rank=adapter.rank,
        digest=adapter.digest,
        layout=layout,
        data=data,
        blocks=blocks,
        pieces=pieces,
        sources=[wide[p.dtype].as_strided((p.rows, p.width), (p.width, 1), p.image) for p in pieces],
        extent={part.slot: part.values.numel() for part in parts},
        has_affine=bool(affine),
    )


def serial_pieces(flat: Tensor) -> tuple[Tensor, ...]:
    """Cuts a 1-D tensor into views that torch works on in the calling thread."""
    size = flat.numel()
    if size <= SERIAL_ELEMENTS:
        return (flat,)
    return tuple(flat[start : start + SERIAL_ELEMENTS] for start in range(0, size, SERIAL_ELEMENTS))


def _blocks(parts: list[_Part]) -> Iterator[Block]:
    """The parts' blocks in order, those merged that adjoin in the slot as they do in the image."""
    image = 0
    begin = end = -1  # in the slot: of the run of parts without gaps that ends at ``image``
    for slot, pitch, values in parts:
        rows, width = values.shape
        if slot != end or width != pitch:
            if begin < end:
                yield Block(begin, image - (end - begin), 1, end - begin, end - begin)
            begin = end = slot
        if width == pitch:
            end += rows * width
        else:
            yield Block(slot, image, rows, width, pitch)
            begin = end = -1
        image += rows * width
    if begin < end:
        yield Block(begin, image - (end - begin), 1, end - begin, end - begin)


def _pieces(blocks: tuple[Block, ...], data: Tensor, slot_elements: int) -> Iterator[Piece]:
    size = data.element_size()
    for block in blocks:
        # Every row, in the slot and in the image, and both wholes must consist of wide elements.
        offsets = (block.slot, block.image, block.width, block.pitch)
        granule = math.gcd(*offsets, slot_elements, data.numel()) * size
        unit = next((unit for unit in _WIDE if unit > size and granule % unit == 0), size)
        slot, image, width, pitch = (offset * size // unit for offset in offsets)
        dtype = _WIDE[unit] if unit > size else data.dtype
        if block.rows == 1:
            for start in range(0, width, SERIAL_ELEMENTS):
                count = min(SERIAL_ELEMENTS, width - start)
                yield Piece(dtype, slot + start, image + start, 1, count, count)
        else:
            step = max(1, SERIAL_ELEMENTS // width)
            for row in range(0, block.rows, step):
                rows = min(step, block.rows - row)
                yield Piece(dtype, slot + row * pitch, image + row * width, rows, width, pitch)


def _check(layout: SlotLayout, adapter: Adapter, affine: Mapping[tuple[int, str], Tensor]) -> None:
    if adapter.rank > layout.max_rank:
        raise ConfigError(f"adapter rank {adapter.rank} exceeds max_lora_rank={layout.max_rank}")
    for key in (*adapter.tensors, *affine):
        if key not in layout.places:
            raise ConfigError(
                f"adapter tensors of layer {key[0]}, {key[1]}: the slots hold {', '.join(layout.modules)} "
                f"of {layout.spec.num_layers} layers; add the module to target_modules"
            )
    for (layer, module), (a, b) in adapter.tensors.items():
        rank, (n_in, n_out) = a.shape[0], layout.places[layer, module].shape
        expected = ((rank, n_in), (n_out, rank))
        if (tuple(a.shape), tuple(b.shape)) != expected or rank > adapter.rank:
            raise ConfigError(
                f"adapter tensors of layer {layer}, {module}: expected A and B of shapes {expected} with "
                f"rank <= {adapter.rank}, found {tuple(a.shape)} and {tuple(b.shape)}"
            )
    for (layer, module), values in affine.items():
        expected_affine = (2, layout.places[layer, module].shape.out_features)
        if tuple(values.shape) != expected_affine:
            raise ConfigError(
                f"gain and shift of layer {layer}, {module}: expected shape {expected_affine}, "
                f"found {tuple(values.shape)}"
            )
