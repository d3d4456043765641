"""Adapters in int8: every row of A, and every column of B, as whole numbers up to 127 times a scale.

The row of A and the column of B that meet have one scale together, which stands with A; see
:mod:`aioengine.kernels.slots`. (A scale for each row of a matrix: LLM.int8(), Dettmers et al., 2022,
https://arxiv.org/abs/2208.07339.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aioengine.kernels.slots import Column
from aioengine.model.buffer import Allocate, pageable
from aioengine.model.slots import image as images
from aioengine.model.slots.layout import SlotLayout

_LARGEST = 127


def quantize_image(
    image: images.AdapterImage, layout: SlotLayout, allocate: Allocate = pageable
) -> images.AdapterImage:
    """Turn an image into one for int8 slots of ``layout``, in the calling thread alone.

    A row or a column that is not finite gets a scale of NaN, so that it is not served as something else.
    """
    dtype = image.data.dtype
    places = dict(zip(layout.places, image.table.tolist(), strict=True))
    held = {key: row for key, row in places.items() if row[Column.A_RANK] or row[Column.B_RANK]}
    ranks = {key: (row[Column.A_RANK], row[Column.B_RANK]) for key, row in held.items()}
    affine = {key: row for key, row in places.items() if row[Column.AFFINE] >= 0}
    shape = images.image_shape(layout, ranks, affine.keys(), torch.int8, image.tokens)
    data = images.image_memory(shape.elements, torch.int8, allocate)

    def matrix(memory: Tensor, begin: int, rows: int, width: int) -> Tensor:
        return memory[begin : begin + rows * width].view(rows, width)

    for key, row in held.items():
        n_in, n_out = layout.places[key].shape
        rank, columns = ranks[key]
        a, b = (
            matrix(image.data, row[Column.A], rank, n_in),
            matrix(image.data, row[Column.B], n_out, columns),
        )
        of_a = _quantize(a, matrix(data, shape.begin(key, Column.A), rank, n_in), over=1)
        of_b = _quantize(b, matrix(data, shape.begin(key, Column.B), n_out, columns), over=0)
        begin = shape.begin(key, Column.SCALE)
        torch.mul(of_a, of_b, out=data[begin : begin + 4 * rank].view(torch.float32))

    def keep(source: int, begin: int, size: int) -> None:
        """Copy ``size`` numbers as they are."""
        target = data[begin : begin + size * dtype.itemsize].view(dtype)
        for to, piece in images.serial_copies(image.data[source : source + size], target):
            to.copy_(piece)

    for key, row in affine.items():
        keep(row[Column.AFFINE], shape.begin(key, Column.AFFINE), 2 * layout.places[key].num_outputs)
    if image.tokens is not None:
        keep(image.tokens_begin, shape.tokens_begin, image.tokens.num_rows * layout.spec.hidden_size)
    return shape.image(data, rank=image.rank, digest=image.digest, has_affine=image.has_affine)


def _quantize(values: Tensor, out: Tensor, *, over: int) -> Tensor:
    """Write the nearest whole numbers of ``values`` [n, m] times their scales to ``out``, int8, and return
    the scales: one for all that have the same index in the other dimension than ``over``."""
    largest = torch.zeros(values.shape[1 - over])
    for rows, columns in _pieces(values):
        kept = largest[rows if over else columns]
        torch.maximum(kept, values[rows, columns].float().abs().amax(over), out=kept)
    scale = largest.div_(_LARGEST)
    scale[~scale.isfinite()] = torch.nan
    by = scale.where(scale > 0, 1).unsqueeze(over)
    for rows, columns in _pieces(values):
        whole = values[rows, columns].float().div(by[rows] if over else by[:, columns]).round_()
        out[rows, columns] = whole.nan_to_num_(0.0)
    return scale


def _pieces(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pieces so small that torch works on them in the calling thread."""
    height, width = matrix.shape
    columns = min(width, images.SERIAL_ELEMENTS)
    rows = max(1, images.SERIAL_ELEMENTS // max(1, columns))
    for row in range(0, height, rows):
        for column in range(0, width, columns):
            yield slice(row, row + rows), slice(column, column + columns)
