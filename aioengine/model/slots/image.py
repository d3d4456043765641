"""An adapter in CPU memory, in the order of a slot: putting it into one takes hardly more than a memcpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.model.buffer import Buffer
from aioengine.model.slots.layout import SlotLayout

SERIAL_ELEMENTS = 32_000
"""torch works on up to so many elements in the calling thread (it goes parallel from 32768)."""

_WIDE = {16: torch.complex128, 8: torch.int64, 4: torch.int32}


class Adapter(Protocol):
    """What :func:`build_image` reads of an :class:`aioengine.adapters.peft.read.PackedAdapter`."""

    @property
    def rank(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def tensors(self) -> Mapping[tuple[int, str], tuple[Tensor, Tensor]]: ...

    @property
    def in_order(self) -> Tensor | None:
        """Flat memory that begins with the tensors in the order of a slot, without gaps, and has room for
        gains and shifts behind them: taken as it is. None: they are copied together."""

    @property
    def shape(self) -> ImageShape | None:
        """The image's shape, if it is known already and ``in_order`` is the whole image."""


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


class Stretch(NamedTuple):
    """A matrix in a slot: ``rows`` rows of ``width`` elements, ``pitch`` apart."""

    slot: int
    """Offset in the slot, in elements."""
    pitch: int
    rows: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class ImageShape:
    """All of an image but its data; adapters of the same modules and ranks have the same."""

    layout: SlotLayout
    dtype: torch.dtype
    elements: int
    blocks: tuple[Block, ...]
    pieces: tuple[Piece, ...]
    extent: Mapping[int, int]

    def image(self, data: Tensor, *, rank: int, digest: str, has_affine: bool = False) -> AdapterImage:
        """``data`` [elements] is kept, not copied."""
        wide = {piece.dtype: data.view(piece.dtype) for piece in self.pieces}
        return AdapterImage(
            rank=rank,
            digest=digest,
            layout=self.layout,
            data=data,
            blocks=self.blocks,
            pieces=self.pieces,
            sources=[wide[p.dtype].as_strided((p.rows, p.width), (p.width, 1), p.image) for p in self.pieces],
            extent=self.extent,
            has_affine=has_affine,
        )


def image_shape(layout: SlotLayout, stretches: Sequence[Stretch], dtype: torch.dtype) -> ImageShape:
    """``stretches`` in the order of the slot."""
    elements = sum(stretch.rows * stretch.width for stretch in stretches)
    blocks = tuple(_blocks(stretches))
    pieces = tuple(_pieces(blocks, dtype, elements, layout.elements))
    extent = {stretch.slot: stretch.rows * stretch.width for stretch in stretches}
    return ImageShape(layout, dtype, elements, blocks, pieces, extent)


def build_image(
    layout: SlotLayout,
    adapter: Adapter,
    affine: Mapping[tuple[int, str], Tensor],
    dtype: torch.dtype,
    *,
    pin_memory: bool = False,
) -> AdapterImage:
    """Puts an adapter into an image of ``dtype``, in the calling thread alone.

    ``affine`` gives gain and shift [2, out] of the modules that have them. Raises :class:`ConfigError`
    if the adapter does not fit the layout.
    """
    if adapter.shape is not None and adapter.in_order is not None and not affine:
        return adapter.shape.image(adapter.in_order, rank=adapter.rank, digest=adapter.digest)
    _check(layout, adapter, affine)
    parts: list[tuple[Stretch, Tensor]] = []
    for key, (a, b) in adapter.tensors.items():
        place = layout.places[key]
        parts.append((Stretch(place.a, place.shape.in_features, *a.shape), a))
        parts.append((Stretch(place.b, place.b_rank, *b.shape), b))
    for key, values in affine.items():
        place = layout.places[key]
        parts.append((Stretch(place.affine, place.num_outputs, *values.shape), values))
    parts.sort(key=lambda part: part[0].slot)

    sizes = [values.numel() for _, values in parts]
    if adapter.in_order is None:
        data = image_memory(sum(sizes), dtype, pin_memory=pin_memory)
        there = 0
    else:
        data = adapter.in_order[: sum(sizes)]
        there = 2 * len(adapter.tensors)  # A and B of each, which come before all gains and shifts
    shares = data.split_with_sizes(sizes)
    pairs = zip(parts[there:], shares[there:], strict=True)
    if copies := [copy for (_, values), share in pairs for copy in serial_copies(values, share)]:
        torch._foreach_copy_([to for to, _ in copies], [values for _, values in copies])
    shape = image_shape(layout, [stretch for stretch, _ in parts], dtype)
    return shape.image(data, rank=adapter.rank, digest=adapter.digest, has_affine=bool(affine))


def image_memory(elements: int, dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Uninitialised memory for an image: [elements]. Page-locked, so that a GPU copies it by itself, if
    asked."""
    if pin_memory:
        return torch.empty(elements, dtype=dtype, pin_memory=True)
    return Buffer(elements * dtype.itemsize).tensor.view(dtype)


def serial_pieces(flat: Tensor) -> tuple[Tensor, ...]:
    """Cuts a 1-D tensor into views that torch works on in the calling thread."""
    size = flat.numel()
    if size <= SERIAL_ELEMENTS:
        return (flat,)
    return tuple(flat[start : start + SERIAL_ELEMENTS] for start in range(0, size, SERIAL_ELEMENTS))


def serial_copies(values: Tensor, to: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(target, source) of copies that torch does in the calling thread. ``to`` is flat; ``values``
    [rows, width] may have gaps."""
    if values.is_contiguous():
        yield from zip(serial_pieces(to), serial_pieces(values.view(-1)), strict=True)
        return
    rows, width = values.shape
    to, step = to.view(rows, width), max(1, SERIAL_ELEMENTS // width)
    for row in range(0, rows, step):
        for column in range(0, width, SERIAL_ELEMENTS):
            piece = slice(row, row + step), slice(column, column + SERIAL_ELEMENTS)
            yield to[piece], values[piece]


def _blocks(stretches: Sequence[Stretch]) -> Iterator[Block]:
    """Their blocks in order, those merged that adjoin in the slot as they do in the image."""
    image = 0
    begin = end = -1  # in the slot: of the run of stretches without gaps that ends at ``image``
    for slot, pitch, rows, width in stretches:
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


def _pieces(
    blocks: tuple[Block, ...], own: torch.dtype, elements: int, slot_elements: int
) -> Iterator[Piece]:
    size = own.itemsize
    for block in blocks:
        # Every row, in the slot and in the image, and both wholes must consist of wide elements.
        offsets = (block.slot, block.image, block.width, block.pitch)
        granule = math.gcd(*offsets, slot_elements, elements) * size
        unit = next((unit for unit in _WIDE if unit > size and granule % unit == 0), size)
        slot, image, width, pitch = (offset * size // unit for offset in offsets)
        dtype = _WIDE[unit] if unit > size else own
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
        rank = b.shape[1]
        expected = layout.held(module, rank)
        if (a.shape, b.shape) != expected or rank > adapter.rank:
            raise ConfigError(
                f"adapter tensors of layer {layer}, {module}: expected A and B of shapes {expected} with "
                f"rank <= {adapter.rank}, found {tuple(a.shape)} and {tuple(b.shape)}"
            )
    for (layer, module), values in affine.items():
        expected_affine = (2, layout.num_held_outputs(module))
        if tuple(values.shape) != expected_affine:
            raise ConfigError(
                f"gain and shift of layer {layer}, {module}: expected shape {expected_affine}, "
                f"found {tuple(values.shape)}"
            )
