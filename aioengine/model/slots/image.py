"""An adapter in CPU memory, as a slot holds it: putting it into one is a memcpy.

In int8, every row of A and every column of B are whole numbers up to 127 times a scale; the row of A and the
column of B that meet have one scale together, which stands with A: see :mod:`aioengine.kernels.slots`. (A
scale for each row of a matrix: LLM.int8(), Dettmers et al., 2022, https://arxiv.org/abs/2208.07339.)
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from aioengine.kernels.cpu.shared_library import openmp_runtimes
from aioengine.kernels.slots import Column
from aioengine.model.buffer import Allocate, pageable
from aioengine.model.pooling import Head, Kind
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.tokens import TokenTables, TrainedTokens

Key = tuple[int, str]
"""Layer and module."""


class Adapter(Protocol):
    """Adapter as :func:`build_image` reads it, for example an
    :class:`aioengine.adapters.peft.pack.PackedAdapter`."""

    @property
    def rank(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def tensors(self) -> Mapping[Key, tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageShape:
    """Everything of an image except its data. Adapters with the same modules and ranks share one."""

    layout: SlotLayout
    dtype: torch.dtype
    elements: int
    rows: list[list[int]]
    """[places, columns] where each place is in the data: see :class:`aioengine.kernels.slots.Column`."""
    tokens: TokenTables | None = None
    """Trained tokens, if there are any."""
    tokens_begin: int = 0
    """Offset of their rows in the data."""

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def begin(self, key: Key, column: Column) -> int:
        """Return the offset of a place's A, B, or gain and shift."""
        return self.rows[self.layout.index[key]][column]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterImage:
    """The elements that an adapter puts into a slot, in one buffer."""

    shape: ImageShape
    data: Tensor
    """[elements]"""
    rank: int
    digest: str
    has_affine: bool = False
    """Whether an output is scaled or shifted (DoRA, ``lora_bias``)."""
    head: Head | None = None
    """A trained head beside the slot's memory."""
    pooling: Kind | None = None
    invocation: tuple[int, ...] = ()
    """The tokens from which on it is applied, if it is an activated LoRA adapter; none: to all tokens."""

    def matrices(self) -> dict[Key, tuple[Tensor, Tensor]] | None:
        """Return A and B of each place, as views; None if it is more than these, or int8."""
        layout = self.shape.layout
        more = self.has_affine or self.shape.tokens is not None or self.head is not None or self.invocation
        if more or layout.holds.int8:
            return None
        found: dict[Key, tuple[Tensor, Tensor]] = {}
        for (key, place), row in zip(layout.places.items(), self.shape.rows, strict=True):
            if row[Column.A_RANK]:
                a, b, rank = row[Column.A], row[Column.B], row[Column.B_RANK]
                n_in, n_out = place.shape
                found[key] = (
                    self.data[a : a + row[Column.A_RANK] * n_in].view(-1, n_in),
                    self.data[b : b + n_out * rank].view(n_out, rank),
                )
        return found

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.head is None else self.head.nbytes)


def image_shape(
    layout: SlotLayout,
    ranks: Mapping[Key, tuple[int, int]],
    affine: Collection[Key],
    dtype: torch.dtype,
    tokens: TokenTables | None = None,
) -> ImageShape:
    """Return the shape of the image of an adapter with these rows of A and columns of B, with gain and shift
    for the places ``affine``, and with trained ``tokens``."""
    rows = [[0, 0, 0, 0, -1, -1] for _ in layout.places]
    end, holds = 0, layout.holds
    # Floats follow each other without gaps.
    rounded: Callable[[int], int] = holds.matrix if holds.int8 else int
    for fused in layout.fused:
        held = [(fused.layer, module) for module in fused.modules if (fused.layer, module) in ranks]
        for key in held:
            row, rank = rows[layout.index[key]], ranks[key][0]
            row[Column.A], row[Column.A_RANK] = end, rank
            end += rounded(rank * layout.places[key].shape.in_features)
        for key in held if holds.int8 else ():
            rows[layout.index[key]][Column.SCALE] = end
            end += holds.scales(ranks[key][0])
        for key in held:
            row, rank = rows[layout.index[key]], ranks[key][1]
            row[Column.B], row[Column.B_RANK] = end, rank
            end += rounded(rank * layout.places[key].shape.out_features)
    for key, place in layout.places.items():
        if key in affine:
            rows[layout.index[key]][Column.AFFINE] = end
            end += rounded(2 * place.num_outputs * holds.affine)
    begin, count = end, 0 if tokens is None else tokens.num_rows
    end += rounded(count * layout.spec.hidden_size * holds.affine)
    return ImageShape(layout, dtype, end, rows, tokens, begin)


def build_image(
    layout: SlotLayout,
    adapter: Adapter,
    affine: Mapping[Key, Tensor],
    dtype: torch.dtype,
    allocate: Allocate = pageable,
    *,
    scalings: Mapping[Key, float] = MappingProxyType({}),
    tokens: TrainedTokens | None = None,
) -> AdapterImage:
    """Put an adapter into an image of ``dtype``, or of whole numbers where the slots are int8.

    ``affine`` gives gain and shift [2, out] of the modules that have them, ``scalings`` what B is multiplied
    by where that is not 1, and ``tokens`` the trained tokens, if there are any. In int8, a row or a column
    that is not finite gets a scale of NaN, so that it is not served as something else. What reads an adapter
    has checked that it fits the layout.
    """
    holds = layout.holds
    shape = image_shape(
        layout,
        {key: (len(a), b.shape[1]) for key, (a, b) in adapter.tensors.items()},
        affine,
        torch.int8 if holds.int8 else dtype,
        None if tokens is None else tokens.tables,
    )
    data = allocate(shape.nbytes).view(shape.dtype)
    if not _exact(layout, adapter):
        data.zero_()
    numbers = data.view(dtype)  # of what is never int8
    factors = {factor: torch.tensor(factor) for factor in set(scalings.values())}
    copies: list[tuple[Tensor, Tensor]] = []

    def memory(of: Tensor, begin: int, values: Tensor, width: int) -> Tensor:
        """Return the memory of ``values`` that begin there, in rows of ``width``."""
        return of.as_strided(values.shape, (width, 1), of.storage_offset() + begin)

    def put(begin: int, values: Tensor, width: int, factor: float = 1.0) -> None:
        target = memory(numbers, begin // holds.affine, values, width)
        if factor == 1.0:
            copies.append((target, values))
        else:
            multiply(values, factors[factor], target)

    for key, (a, b) in adapter.tensors.items():
        n_in, rank = layout.places[key].shape.in_features, b.shape[1]
        at_a, at_b, factor = shape.begin(key, Column.A), shape.begin(key, Column.B), scalings.get(key, 1.0)
        if holds.int8:
            if factor != 1.0:
                scaled = torch.empty(b.shape, dtype=dtype)
                multiply(b, factors[factor], scaled)
                b = scaled
            scale_b = _quantize(b, memory(data, at_b, b, rank), over=0)
            scale = _quantize(a, memory(data, at_a, a, n_in), over=1) * scale_b
            begin = shape.begin(key, Column.SCALE)
            data[begin : begin + scale.nbytes].view(torch.float32).copy_(scale)
        else:
            put(at_a, a, n_in)
            put(at_b, b, rank, factor)
    for key, values in affine.items():
        width = layout.places[key].num_outputs
        put(shape.begin(key, Column.AFFINE), values, width)
    if tokens is not None:
        put(shape.tokens_begin, tokens.rows, layout.spec.hidden_size)
    if copies:
        torch._foreach_copy_([to for to, _ in copies], [values for _, values in copies])
    return AdapterImage(shape, data, adapter.rank, adapter.digest, bool(affine))


def multiply(values: Tensor, number: Tensor, to: Tensor) -> None:
    """Write ``values`` times ``number``, in float32, to ``to``, rounded once."""
    if values.dtype != to.dtype:
        number = number.view(1)  # without a dimension it would leave the product in the dtype of ``values``
    torch.mul(values, number, out=to)


@contextmanager
def calling_thread_alone() -> Iterator[None]:
    """Context in which torch computes in the calling thread, and not with a team of OpenMP threads. Images
    are made and copied beside the steps, with whose team it would compete for the cores. On Linux only:
    elsewhere nothing changes."""
    before = torch.get_num_threads()  # torch sets a new thread's number when it is first asked for
    for runtime in _runtimes():
        runtime.omp_set_num_threads(1)
    try:
        yield
    finally:
        for runtime in _runtimes():
            runtime.omp_set_num_threads(before)


@functools.cache
def _runtimes() -> list[ctypes.CDLL]:
    """Return the OpenMP runtimes of this process, where the number of threads is the calling thread's own."""
    return [ctypes.CDLL(path) for path in openmp_runtimes()]


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. A sum has one if a value is one, and costs a fraction of
    isfinite; if only the sum is too large, each value is looked at."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def _exact(layout: SlotLayout, adapter: Adapter) -> bool:
    """Whether every matrix has the inputs and outputs of its place. Of a vocabulary that does not divide by
    the ranks of a group, the last rank has less."""
    return all((a.shape[1], len(b)) == layout.places[key].shape for key, (a, b) in adapter.tensors.items())


_LARGEST = 127


def _quantize(values: Tensor, out: Tensor, *, over: int) -> Tensor:
    """Write the nearest whole numbers of ``values`` [n, m] times their scales to ``out``, int8, and return
    the scales: one for all that have the same index in the other dimension than ``over``."""
    wide = values.float()
    scale = wide.abs().amax(over).div_(_LARGEST)
    scale[~scale.isfinite()] = torch.nan
    out.copy_(wide.div(scale.where(scale > 0, 1).unsqueeze(over)).round_().nan_to_num_(0.0))
    return scale
